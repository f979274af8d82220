"""The schedule's expansion to torchdistill's stages."""

import copy
import logging
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
        for name in ("num_epochs", "val_data_loader", "optimizer", "scheduler"):
            assert stage[name] == arguments()[name]
        assert stage["teacher"] == {"forward_proc": "forward_batch_only", "requires_grad": False}
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


@pytest.mark.parametrize(
    ("rule", "terms", "order"),
    [
        ("independent", ["ce"], [0, 1, 2]),
        ("residual", ["ce", "rule"], [0, 1, 2]),
        ("bdistil", ["ce", "rule"], [0, 1, 2]),
        ("assistant", ["ce", "rule"], [2, 1, 0]),
    ],
)
def test_terms_and_order_of_the_rule(rule, terms, order):
    train = progressive(**arguments(rule=rule))
    for k, position in enumerate(order, start=1):
        stage = train[f"stage{k}"]
        assert list(stage["criterion"]["kwargs"]["sub_terms"]) == terms
        wrapper = stage["student"]["auxiliary_model_wrapper"]
        assert wrapper["key"] == "mamba_pkd_stage" and wrapper["kwargs"] == {
            "stage": k, "name": STUDENTS[position], "rule": {"key": rule}, "cache_dir": None,
        }  # fmt: skip
        assert stage["student"]["forward_proc"] == "forward_batch_supp_dict"


def test_rule_by_name_or_with_arguments():
    def rules(rule: Any) -> list[Any]:
        train = progressive(**arguments(rule=rule))
        return [train[f"stage{k}"]["student"]["auxiliary_model_wrapper"]["kwargs"]["rule"] for k in (1, 2, 3)]

    assert rules("residual") == rules({"key": "residual"}) == [{"key": "residual"}] * 3
    given = {"key": "residual", "kwargs": {"weight": 0.2, "temperature": 3.0, "step": 0.5}}
    found = rules(given)
    assert found == [given] * 3
    assert len({id(each["kwargs"]) for each in [given, *found]}) == 4, "stages share nothing"


def test_rule_of_a_third_party(tmp_path, monkeypatch):
    (tmp_path / "their_rule.py").write_text(
        "from timm_mamba_pkd.distillation import Rule\n"
        "class Backwards(Rule):\n"
        "    adds_loss = False\n"
        "    largest_first = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    train = progressive(**arguments(rule="their_rule.Backwards"))
    names = [train[f"stage{k}"]["student"]["auxiliary_model_wrapper"]["kwargs"]["name"] for k in (1, 2, 3)]
    assert names == STUDENTS[::-1] and list(train["stage1"]["criterion"]["kwargs"]["sub_terms"]) == ["ce"]


@pytest.mark.parametrize("views", [None, {}, {"num_views": 7, "seed": 3, "mixup_alpha": 0.2, "num_classes": 4}])
@pytest.mark.parametrize("wrapper", [None, {"key": "CRDDatasetWrapper", "kwargs": {"mode": "exact"}}])
def test_the_training_data_becomes_views(views, wrapper):
    loader = {"dataset_id": "train", "kwargs": {"batch_size": 4}} | ({"dataset_wrapper": wrapper} if wrapper else {})
    train = progressive(**arguments(views=views, train_data_loader=loader))
    for k in (1, 2, 3):
        found = train[f"stage{k}"]["train_data_loader"]
        kwargs = {"num_views": 2, **(views or {})} | ({"wrapper": wrapper} if wrapper else {})
        assert found == {**loader, "dataset_wrapper": {"key": "mamba_pkd_views", "kwargs": kwargs}}
        assert train[f"stage{k}"]["val_data_loader"] == arguments()["val_data_loader"]


CACHED = {"key": "mamba_pkd_cached_teacher", "kwargs": {"cache_dir": "c"}}


@pytest.mark.parametrize(
    ("teacher", "why"),
    [
        (None, None),
        ({}, None),
        ({"forward_proc": "forward_batch_only"}, None),
        ({"forward_hook": {"input": [], "output": []}}, None),
        ({"forward_hook": {"output": ["layer1", "fc"], "input": ["fc"]}}, "losses hook its fc, layer1"),
        ({"sequential": ["conv1"]}, "its section sets sequential"),
        ({"forward_proc": "forward_batch_target"}, "its section sets forward_proc"),
        ({"auxiliary_model_wrapper": {"key": "X"}}, "its section sets auxiliary_model_wrapper"),
    ],
)
def test_the_teacher_is_cached_where_only_its_logits_are_used(teacher, why, caplog):
    with caplog.at_level(logging.INFO):
        train = progressive(**arguments(teacher=teacher, cache_dir="c"))
    for k in (1, 2, 3):
        found = train[f"stage{k}"]["teacher"]
        assert found["requires_grad"] is False
        if why is None:
            assert found["auxiliary_model_wrapper"] == CACHED and found["forward_proc"] == "forward_batch_supp_dict"
        else:
            assert found == {"forward_proc": "forward_batch_only", **(teacher or {}), "requires_grad": False}
        assert train[f"stage{k}"]["student"]["auxiliary_model_wrapper"]["kwargs"]["cache_dir"] == "c"
    message = f"The teacher runs at every step and its logits are not cached, because {why}"
    assert caplog.messages == ([] if why is None else [message])
    assert "auxiliary_model_wrapper" not in progressive(**arguments())["stage1"]["teacher"]


def test_a_part_of_the_student_takes_images_only():
    train = progressive(**arguments(rule="independent", student={"sequential": ["stem"]}))
    assert train["stage2"]["student"]["forward_proc"] == "forward_batch_only"


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
    "kwargs": {"sub_terms": {"rule": {"criterion": {"key": "MSELoss"}, "weight": 1}}},
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
        ({"student": {"forward_proc": "forward_batch_only"}}, "student.forward_proc is the schedule's own; remove it"),
        ({"student": {"sequential": ["stem"]}}, "rule residual needs the student's logits: remove student.sequential"),
        ({"cache_dir": ""}, "cache_dir must be the path of a folder, got ''"),
        ({"cache_dir": "x", "train_data_loader": {"collate_fn": "mix"}}, "collate_fn mix may change the images"),
        ({"views": {"num_view": 3}}, "views has no 'num_view'; it has num_views, seed, mixup_alpha"),
        ({"views": {"wrapper": {}}}, "views has no 'wrapper'"),
        ({"views": {"num_views": 0}}, "views: num_views must be an integer of at least 1, got 0"),
        ({"views": {"seed": -1}}, "views: seed must be an integer of at least 0, got -1"),
        ({"views": {"mixup_alpha": "0.2"}}, "views: mixup_alpha must be a number of at least 0, got '0.2'"),
        ({"views": {"cutmix_alpha": -1}}, "views: cutmix_alpha must be a number of at least 0, got -1"),
        ({"criterion": {"key": "KDLoss", "kwargs": {}}}, "criterion needs kwargs.sub_terms"),
        ({"criterion": {"key": "KDLoss"}}, "criterion needs kwargs.sub_terms"),
        ({"criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": None}}}, "criterion needs kwargs.sub_terms"),
        ({"criterion": TAKEN}, "the rule adds a term 'rule'"),
        ({"criterion": NO_TERMS, "rule": "independent"}, "there is nothing to learn"),
        ({"rule": "residul"}, "unknown rule 'residul'; known: assistant, bdistil, independent, residual"),
        ({"rule": None}, "rule must be a name or"),
        (
            {"rule": "no_such_package.Rule"},
            "rule no_such_package.Rule cannot be imported: ModuleNotFoundError: No module named",
        ),
        ({"rule": "timm.create_model"}, "rule timm.create_model is no subclass of timm_mamba_pkd.distillation.Rule"),
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
    assert [list(train[f"stage{k}"]["criterion"]["kwargs"]["sub_terms"]) for k in (1, 2, 3)] == [["rule"]] * 3
    assert NO_TERMS == {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {}}}
