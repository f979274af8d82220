"""The schedule's expansion to torchdistill's stages."""

import copy
from typing import Any

import pytest

from timm_mamba_pkd import progressive

STUDENTS = ["mamba_pkd_s1", "mamba_pkd_s2", "mamba_pkd_s3"]


def arguments(**changes: Any) -> dict[str, Any]:
    ce = {"criterion": {"key": "CrossEntropyLoss", "kwargs": {}}, "weight": 0.5}
    return {
        "students": STUDENTS,
        "num_epochs": 2,
        "train_data_loader": {"dataset_id": "train", "kwargs": {"batch_size": 4}},
        "val_data_loader": {"dataset_id": "val", "kwargs": {"batch_size": 4}},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
        "scheduler": {"key": "StepLR", "kwargs": {"step_size": 1}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"ce": ce}}},
        **changes,
    }


def test_one_stage_for_every_student():
    train = progressive(**arguments(log_freq=7, amp=True))
    assert list(train) == ["log_freq", "amp", "stage1", "stage2", "stage3"]
    assert (train["log_freq"], train["amp"]) == (7, True)
    for k in (1, 2, 3):
        stage = train[f"stage{k}"]
        for name in ("num_epochs", "train_data_loader", "val_data_loader", "optimizer", "scheduler"):
            assert stage[name] == arguments()[name]
        assert stage["teacher"] == {"forward_proc": "forward_batch_only", "requires_grad": False}
        assert stage["student"]["forward_proc"] == "forward_batch_only"
        assert stage["student"]["auxiliary_model_wrapper"]["kwargs"]["stage"] == k


def test_stages_share_nothing_and_the_arguments_stay():
    given = arguments()
    before = copy.deepcopy(given)
    train = progressive(**given)
    # What torchdistill itself changes in place.
    train["stage1"]["optimizer"]["kwargs"]["lr"] *= 10
    train["stage1"]["train_data_loader"]["requires_supp"] = True
    train["stage1"]["criterion"]["kwargs"]["sub_terms"]["ce"]["weight"] = 9
    assert given == before
    for k in (2, 3):
        stage = train[f"stage{k}"]
        assert stage["optimizer"]["kwargs"]["lr"] == 0.1
        assert "requires_supp" not in stage["train_data_loader"]
        assert stage["criterion"]["kwargs"]["sub_terms"]["ce"]["weight"] == 0.5


def test_terms_and_hooks_of_the_rule():
    hooks = {"input": ["head"], "output": ["stages.1"]}
    train = progressive(**arguments(student={"forward_hook": hooks}))
    assert hooks == {"input": ["head"], "output": ["stages.1"]}
    for k, outputs in ((1, ["stages.1"]), (2, ["stages.1", "earlier"]), (3, ["stages.1", "earlier"])):
        stage = train[f"stage{k}"]
        assert list(stage["criterion"]["kwargs"]["sub_terms"]) == ["ce", "residual"]
        assert stage["student"]["forward_hook"] == {"input": ["head"], "output": outputs}
        assert stage["student"]["auxiliary_model_wrapper"]["kwargs"]["sees_earlier"]
    train = progressive(**arguments(rule="independent"))
    for k in (1, 2, 3):
        stage = train[f"stage{k}"]
        assert list(stage["criterion"]["kwargs"]["sub_terms"]) == ["ce"]
        assert "forward_hook" not in stage["student"]
        assert not stage["student"]["auxiliary_model_wrapper"]["kwargs"]["sees_earlier"]


def test_rule_by_name_or_with_arguments():
    def terms(rule: Any) -> list[Any]:
        train = progressive(**arguments(rule=rule))
        return [train[f"stage{k}"]["criterion"]["kwargs"]["sub_terms"]["residual"] for k in (1, 2, 3)]

    assert terms("residual") == terms({"key": "residual"}) == terms({"key": "residual", "kwargs": None})
    found = terms({"key": "residual", "kwargs": {"weight": 0.2, "temperature": 3.0, "step": 0.5}})
    assert [term["weight"] for term in found] == [0.2] * 3
    assert [term["criterion"]["kwargs"] for term in found] == [
        {"gain": gain, "temperature": 3.0} for gain in (0, 0.5, 1.0)
    ]


def test_teacher_and_student_sections_are_kept():
    train = progressive(
        **arguments(
            teacher={"forward_hook": {"output": ["layer3"]}, "forward_proc": "forward_batch_target"},
            student={"frozen_modules": ["stem"]},
        )
    )
    for k in (1, 2, 3):
        assert train[f"stage{k}"]["teacher"] == {
            "forward_hook": {"output": ["layer3"]},
            "forward_proc": "forward_batch_target",
            "requires_grad": False,
        }
        assert train[f"stage{k}"]["student"]["frozen_modules"] == ["stem"]


NO_TERMS = {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {}}}
TAKEN = {
    "key": "WeightedSumLoss",
    "kwargs": {"sub_terms": {"residual": {"criterion": {"key": "MSELoss"}, "weight": 1}}},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"students": []}, "students must be a list"),
        ({"students": "mamba_pkd_s1"}, "students must be a list"),
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1, got 0"),
        ({"num_epochs": 1.5}, "num_epochs must be an integer of at least 1, got 1.5"),
        ({"num_epochs": "2"}, "num_epochs must be an integer of at least 1, got '2'"),
        ({"teacher": {"requires_grad": True}}, "remove teacher.requires_grad"),
        ({"student": {"auxiliary_model_wrapper": {"key": "X"}}}, "student.auxiliary_model_wrapper"),
        ({"criterion": {"key": "KDLoss", "kwargs": {}}}, "criterion needs kwargs.sub_terms"),
        ({"criterion": {"key": "KDLoss"}}, "criterion needs kwargs.sub_terms"),
        ({"criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": None}}}, "criterion needs kwargs.sub_terms"),
        ({"criterion": TAKEN}, "the rule adds a term 'residual'"),
        ({"criterion": NO_TERMS, "rule": "independent"}, "there is nothing to learn"),
        ({"rule": "residul"}, "unknown rule 'residul'; known: independent, residual"),
        ({"rule": None}, "rule must be a name or"),
        ({"rule": ["residual"]}, "rule must be a name or"),
        ({"rule": {"kwargs": {}}}, "rule must be a name or"),
        ({"rule": {"key": "residual", "kwarg": {"step": 0}}}, "rule must be a name or"),
        ({"rule": {"key": "residual", "kwargs": {"stepp": 0}}}, "rule residual: .*'stepp'"),
        ({"rule": {"key": "residual", "kwargs": {"step": 2}}}, "step must be from 0 to 1, got 2"),
        ({"rule": {"key": "independent", "kwargs": {"step": 0}}}, "rule independent: "),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        progressive(**arguments(**changes))


def test_the_rule_alone_is_a_criterion():
    train = progressive(**arguments(criterion=NO_TERMS))
    assert [list(train[f"stage{k}"]["criterion"]["kwargs"]["sub_terms"]) for k in (1, 2, 3)] == [["residual"]] * 3
    assert NO_TERMS == {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {}}}
