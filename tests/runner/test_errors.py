"""Configs that cannot be trained: one line on stderr with file and line, exit code 2, before anything is written."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Those of the progressive schedule."""
    return config["train"]["init"]["kwargs"]


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(config: Any) -> None:
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return change


def with_value(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(config: Any) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


SCHEDULE = ("train", "init", "kwargs")
TERMS = (*SCHEDULE, "criterion", "kwargs", "sub_terms")
CE = (*TERMS, "ce")
TEACHER, STUDENT = ("models", "teacher_model"), ("models", "student_model")
KD = {
    "student_module_path": ".", "student_module_io": "output",
    "teacher_module_path": ".", "teacher_module_io": "output", "temperature": 4.0, "alpha": 0.5,
}  # fmt: skip


def kd(**changes: Any) -> dict[str, Any]:
    kwargs = {key: value for key, value in {**KD, **changes}.items() if value is not None}
    return {"criterion": {"key": "KDLoss", "kwargs": kwargs}, "weight": 1.0}


# What is changed, the words in the config's line that the error names, and the message.
CASES = [
    (without(*STUDENT), "models:", "names no model: expected models.student_model or models.model"),
    (
        with_value("fake/tset", "test", "test_data_loader", "dataset_id"),
        "dataset_id: fake/tset",
        "test.test_data_loader: unknown dataset_id 'fake/tset'; known: fake/",
    ),
    (
        with_value("x", *SCHEDULE, "val_data_loader", "dataset_id"),
        "dataset_id: x",
        "train.stage1.val_data_loader: unknown dataset_id 'x'",
    ),
    (
        with_value("resnet81", *TEACHER, "kwargs", "model_name"),
        "model_name: resnet81",
        "models.teacher_model: unknown timm model 'resnet81'; known: .*resnet18",
    ),
    (
        with_value("mamba_pkd_ensembel", *STUDENT, "key"),
        "key: mamba_pkd_ensembel",
        "models.student_model: unknown model 'mamba_pkd_ensembel'; known: .*mamba_pkd_ens",
    ),
    (
        with_value(["mamba_pkd_s8"], *STUDENT, "kwargs", "students"),
        "- mamba_pkd_s8",
        "unknown student 'mamba_pkd_s8'; ours are mamba_pkd_s1",
    ),
    (with_value(4, *STUDENT, "kwargs", "img_size"), "img_size: 4", "img_size must be at least 8"),
    (
        with_value(1, *STUDENT, "kwargs", "colours"),
        "colours: 1",
        "mamba_pkd_ensemble has no parameter 'colours'; it has .*students, num_classes",
    ),
    (
        with_value(1, *TEACHER, "kwargs", "colours"),
        "colours: 1",
        "mamba_pkd_timm_model has no parameter 'colours'; it has model_name, small_stem",
    ),
    (
        with_value({"key": "resnet18", "kwargs": {"num_clases": 3}}, *TEACHER),
        "num_clases: 3",
        "ResNet has no parameter 'num_clases'; it has block, layers, num_classes",
    ),
    (
        with_value(3, *STUDENT, "kwargs", "in_chans"),
        "key: mamba_pkd_ensemble",
        "model mamba_pkd_ensemble cannot take images of 1x8x8: ",
    ),
    (
        with_value(5, *TEACHER, "kwargs", "num_classes"),
        "num_classes: 3",
        "teacher has 5 classes, student has 3: set both num_classes",
    ),
    (
        with_value([1, 5], "test", "topk"),
        "topk:",
        "test.topk asks for top-5, but there are 3 classes: set topk: \\[1\\]",
    ),
    (with_value(5, "test", "topk"), "topk: 5", "test.topk must be a list of positive integers, got 5"),
    (with_value("residul", *SCHEDULE, "rule"), "rule: residul", "unknown rule 'residul'; known: .*residual"),
    (
        with_value({"key": "residual", "kwargs": {"wait": 1}}, *SCHEDULE, "rule"),
        "wait: 1",
        "rule residual: residual has no parameter 'wait'; it has weight",
    ),
    (with_value({"requires_grad": True}, *SCHEDULE, "teacher"), "teacher:", "the teacher stays frozen"),
    (with_value("CrossEntropy", *CE, "criterion", "key"), "key: CrossEntropy", "unknown loss.*CrossEntropyLoss"),
    (
        with_value("SimpleWrapper", *CE, "criterion_wrapper", "key"),
        "key: SimpleWrapper",
        "unknown loss wrapper 'SimpleWrapper'; known: .*SimpleLossWrapper",
    ),
    (
        with_value("WeightedSum", *SCHEDULE, "criterion", "key"),
        "key: WeightedSum",
        "unknown high-level loss 'WeightedSum'; known: WeightedSumLoss",
    ),
    (with_value("AdamX", *SCHEDULE, "optimizer", "key"), "key: AdamX", "unknown optimizer 'AdamX'; known: .*AdamW"),
    (
        with_value({"key": "StepX", "kwargs": {}}, *SCHEDULE, "scheduler"),
        "key: StepX",
        "unknown scheduler 'StepX'; known: .*StepLR",
    ),
    (
        with_value(0.9, *SCHEDULE, "optimizer", "kwargs", "momentum"),
        "momentum: 0.9",
        "mamba_pkd_adamw has no parameter 'momentum'; it has lr, weight_decay, betas",
    ),
    (
        with_value({"key": "SGD", "kwargs": {"lr": 0.1, "momentun": 0.9}}, *SCHEDULE, "optimizer"),
        "momentun: 0.9",
        "SGD has no parameter 'momentun'; it has lr, momentum",
    ),
    (
        with_value({"key": "StepLR", "kwargs": {"stepsize": 5}}, *SCHEDULE, "scheduler"),
        "stepsize: 5",
        "StepLR has no parameter 'stepsize'; it has step_size",
    ),
    (with_value({"key": "StepLR", "kwargs": {}}, *SCHEDULE, "scheduler"), "", "StepLR needs 'step_size'"),
    (with_value(-1.0, *SCHEDULE, "optimizer", "kwargs", "lr"), "", "Invalid learning rate: -1.0"),
    (
        with_value(kd(temperature=None, temprature=4.0), *TERMS, "kd"),
        "temprature: 4.0",
        "KDLoss has no parameter 'temprature'; it has student_module_path.*temperature, alpha",
    ),
    (
        with_value(kd(label_smothing=0.1), *TERMS, "kd"),
        "label_smothing: 0.1",
        "KDLoss has no parameter 'label_smothing'; it has .*label_smoothing",
    ),
    (
        with_value(
            {"criterion": {"key": "ATLoss", "kwargs": {"at_pairs": {}, "mod": "paper"}}, "weight": 1.0}, *TERMS, "at"
        ),
        "mod: paper",
        "train.stage1: ATLoss has no parameter 'mod'; it has at_pairs, mode",
    ),
    (with_value(kd(teacher_module_path="layer4"), *TERMS, "kd"), "teacher_module_path: layer4",
     "train.stage1: a loss reads 'layer4', which no forward_hook of this stage records; student: .*; teacher: ."),
    (
        with_value(["mamba_pkd_s1", "mamba_pkd_s2", "mamba_pkd_s3"], *SCHEDULE, "students"),
        "",
        "train.stage3: stage 3 has no student: the ensemble has 2",
    ),
    (
        with_value(["mamba_pkd_s1", "mamba_pkd_s3"], *SCHEDULE, "students"),
        "",
        "stage 2 is to train mamba_pkd_s3, but the ensemble's students are mamba_pkd_s1, mamba_pkd_s2: give both",
    ),
    (
        with_value(["mamba_pkd_s1"], *SCHEDULE, "students"),
        "students:",
        "the schedule has 1 stages, but the ensemble has 2 students: give both the same list",
    ),
    (without(*TEACHER), "models:", "a progressive schedule needs a teacher: name it under models.teacher_model"),
    (
        with_value({"forward_hook": {"output": ["stages.7"]}}, *SCHEDULE, "student"),
        "- stages.7",
        "train.stage1: student: 'stages.7' is no module of MambaPKD, which has stem, stages, norm, head",
    ),
    (
        with_value({"forward_hook": {"output": ["stages.2.blocks.1"]}}, *SCHEDULE, "student"),  # s2 has it, s1 not
        "- stages.2.blocks.1",
        "train.stage1: student: 'stages.2.blocks.1' is no module",
    ),
    (
        with_value({"forward_hook": {"input": ["layer9.0"]}}, *SCHEDULE, "teacher"),
        "- layer9.0",
        "train.stage1: teacher: 'layer9.0' is no module of ResNet, which has conv1, bn1",
    ),
    (
        with_value({"frozen_modules": ["stemm"]}, *SCHEDULE, "student"),
        "- stemm",
        "train.stage1: student: 'stemm' is no module",
    ),
    (
        with_value({"src_ckpt": "gone.pt"}, *SCHEDULE, "teacher"),
        "src_ckpt: gone.pt",
        "train.stage1: teacher: weights file gone.pt does not exist",
    ),
    (
        with_value([{"name": "no_such_package"}], "dependencies"),
        "- name: no_such_package",
        "ModuleNotFoundError: No module named 'no_such_package'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "place", "message"), CASES, ids=[message for _, _, message in CASES])
def test_bad_configs(change, place, message, progressive, run, errors, tmp_path):
    change(progressive)
    code, folder = run(progressive, command="check")
    assert code == 2 and not folder.exists()
    (error,) = errors()
    assert re.search(message, error), error
    line = int(re.match(r"line (\d+): ", error)[1])  # pyright: ignore[reportOptionalSubscript]
    assert place in (tmp_path / "config.yaml").read_text().splitlines()[line - 1]
    assert "__init__" not in error


def test_train_says_the_same(progressive, run, errors):
    with_value("AdamX", *SCHEDULE, "optimizer", "key")(progressive)
    seen = []
    for command in ("check", "train"):
        code, folder = run(progressive, command=command)
        assert code == 2 and not folder.exists()
        seen.append(errors())
    assert seen[0] == seen[1]


def test_a_path_that_only_a_late_student_lacks(progressive, run, errors):
    """s2 has a second block in its last stage, s1 has not."""
    names = ["mamba_pkd_s2", "mamba_pkd_s1"]
    progressive["models"]["student_model"]["kwargs"]["students"] = arguments(progressive)["students"] = names
    arguments(progressive)["student"] = {"forward_hook": {"output": ["stages.2.blocks.1"]}}
    code, folder = run(progressive)
    assert code == 2 and not folder.exists()
    assert "train.stage2: student: 'stages.2.blocks.1' is no module" in errors()[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_value({}, "train", "model"), "train.stage1: unknown forward process function 'None'; known: .*forward"),
        (
            with_value({"forward_proc": "forward_x"}, "train", "model"),
            "unknown forward process function 'forward_x'; known: .*forward_all",
        ),
        (
            with_value({"forward_proc": "forward_batch_only", "forward_hook": {"output": ["stm"]}}, "train", "model"),
            "train.stage1: model: 'stm' is no module",
        ),
        (
            with_value({"forward_proc": "forward_batch_only", "sequential": ["stm", "+x"]}, "train", "model"),
            "train.stage1: model: 'stm' is no module",
        ),
        (
            with_value("head.fc", "train", "criterion", "kwargs", "sub_terms", "ce", "criterion_wrapper", "kwargs",
                       "input", "module_path"),
            "line 93: train.stage1: a loss reads 'head.fc', which no forward_hook of this stage records; model: .$",
        ),
        (
            with_value({}, "train", "criterion", "kwargs", "sub_terms"),
            "line 82: train.stage1: criterion has no sub_terms: there is nothing to learn",
        ),
        (
            with_value(float("nan"), "train", "criterion", "kwargs", "sub_terms", "ce", "weight"),
            "line 79: train.stage1: the loss of the first batch is nan",
        ),
        (
            with_value({"batch_size": 64, "drop_last": True}, "train", "train_data_loader", "kwargs"),
            "line 67: train.stage1.train_data_loader has no batch: is drop_last on and batch_size too large",
        ),
        (
            with_value({"forward_proc": "forward_batch_only", "requires_grad": False}, "train", "model"),
            "train.stage1: optimizer got an empty parameter list",
        ),
        (
            with_value("none", "train", "criterion", "kwargs", "sub_terms", "ce", "criterion", "kwargs", "reduction"),
            "line 79: train.stage1: the loss has shape \\(8,\\) instead of one number",
        ),
    ],
)  # fmt: skip
def test_bad_plain_configs(change, message, plain, run, errors):
    change(plain)
    code, folder = run(plain)
    assert code == 2 and not folder.exists()
    (error,) = errors()
    assert re.search(message, error), error


def test_a_loss_that_depends_on_nothing_trained(progressive, run, errors):
    arguments(progressive)["rule"] = "independent"
    with_value(True, *CE, "criterion_wrapper", "kwargs", "input", "is_from_teacher")(progressive)
    code, folder = run(progressive)
    assert code == 2 and not folder.exists()
    assert errors() == ["line 93: train.stage1: the loss depends on nothing that is trained"]


def test_bad_late_stages(plain, build, run, errors):
    model = {"forward_proc": "forward_batch_only"}
    good, bad = build.stage(model=model), build.stage(model=model, optimizer={"key": "AdamX", "kwargs": {}})
    plain["train"] = {"log_freq": 1, "stage1": good, "stage2": bad}
    code, folder = run(plain)
    assert code == 2 and not folder.exists()
    assert errors()[0].startswith("line 121: train.stage2: unknown optimizer 'AdamX'; known: ")


def test_dumped_configs_are_yaml(progressive, write):
    """The tests' own configs: nothing above may fail for another reason than the one that it names."""
    assert "!import_call" in write(progressive).read_text()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(write(progressive).read_text())


def test_missing_config_and_folder_as_config(tmp_path, run, errors):
    nothing = Path(tmp_path) / "nothing.yaml"
    for command in ("check", "train", "evaluate"):
        assert run(nothing, command=command)[0] == 2
        assert errors() == [f"config {nothing} cannot be read: No such file or directory"]
    assert run(tmp_path)[0] == 2
    assert errors() == [f"config {tmp_path} cannot be read: Is a directory"]
