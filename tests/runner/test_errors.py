"""Bad input: one line on stderr, exit code 2, before anything is written."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torchvision.datasets import FakeData

from timm_mamba_pkd.cli import main

ROOT = Path(__file__).resolve().parents[2]


def error_of(capsys) -> str:
    """The one line that the command left on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mamba-pkd: error: ")
    return line.removeprefix("mamba-pkd: error: ")


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Those of the progressive schedule."""
    return config["train"]["init"]["kwargs"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("models:\n\tkey: x\n", "is not valid YAML: .*'\\\\t'"),
        ("a: [1, 2\n", "is not valid YAML"),
        ("- 1\n- 2\n", "must be a mapping with datasets, models, train and test"),
        ("", "must be a mapping with datasets, models, train and test"),
        ("just text\n", "must be a mapping with datasets, models, train and test"),
        (b"\xff\xfe\x00", "config .*config.yaml"),
        ("datasets: !import_call {key: no.such.module.Data}\n", "ModuleNotFoundError: No module named 'no'"),
        ("datasets: !import_call {key: torchvision.datasets.Nothing}\n", "has no attribute 'Nothing'"),
        ("dependencies: [{name: no_such_package}]\n", "No module named 'no_such_package'"),
        ("a:\n  lr: 1e-4\n", "line 2: YAML takes 1e-4 for text; write the number with a dot and a signed exponent"),
        ("a: [-1E5]\n", "line 1: YAML takes -1E5 for text"),
        ("a: 1.5e3\n", "line 1: YAML takes 1.5e3 for text"),
    ],
)
def test_unreadable_configs(content, message, tmp_path, run, capsys):
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, folder = run(path)
    assert code == 2 and not folder.exists()
    line = error_of(capsys)
    assert re.search(message, line), line


@pytest.mark.parametrize("text", ["1.0e-4", "'1e-4'", "0x1e4", "12e", "1.5e-3", "v1e4"])
def test_other_numbers_and_texts_are_left_alone(text, tmp_path, run, capsys):
    (tmp_path / "config.yaml").write_text(f"a: {text}\n")
    assert run(tmp_path / "config.yaml")[0] == 2
    assert "has no section 'datasets'" in error_of(capsys)


def test_missing_config_and_folder_as_config(tmp_path, run, capsys):
    assert run(tmp_path / "nothing.yaml")[0] == 2
    assert error_of(capsys) == f"config {tmp_path}/nothing.yaml cannot be read: No such file or directory"
    assert run(tmp_path)[0] == 2
    assert error_of(capsys) == f"config {tmp_path} cannot be read: Is a directory"


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
TEACHER, STUDENT = ("models", "teacher_model"), ("models", "student_model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("datasets"), "has no section 'datasets'"),
        (without("models"), "has no section 'models'"),
        (without("train"), "has no section 'train'"),
        (without("test"), "has no section 'test'"),
        (with_value(None, "models"), "has no section 'models'"),
        (without(*STUDENT), "names no model: expected models.student_model or models.model"),
        (without(*STUDENT, "key"), "models.student_model has no 'key'"),
        (with_value("resnet18", *TEACHER), "models.teacher_model has no 'key'"),
        (without("test", "test_data_loader"), "test has no test_data_loader"),
        (without("test", "test_data_loader", "sampler"), "test.test_data_loader: KeyError: 'class_or_func'"),
        (without(*SCHEDULE, "train_data_loader"), "missing 1 required positional argument: 'train_data_loader'"),
        (without(*SCHEDULE, "train_data_loader", "sampler"), "train.stage1: 'class_or_func' is missing or unknown"),
        (
            with_value("fake/tset", "test", "test_data_loader", "dataset_id"),
            "unknown dataset_id 'fake/tset'; known: fake/",
        ),
        (
            with_value("x", *SCHEDULE, "val_data_loader", "dataset_id"),
            "train.stage1.val_data_loader: unknown dataset_id 'x'",
        ),
        (with_value("x", *SCHEDULE, "val_data_loader"), "train.stage1.val_data_loader: unknown dataset_id"),
        (with_value("resnet81", *TEACHER, "kwargs", "model_name"), "unknown timm model 'resnet81'; known: .*resnet18"),
        (
            with_value("mamba_pkd_ensembel", *STUDENT, "key"),
            "unknown model 'mamba_pkd_ensembel'; known: .*mamba_pkd_ens",
        ),
        (
            with_value(["mamba_pkd_s8"], *STUDENT, "kwargs", "students"),
            "unknown student 'mamba_pkd_s8'; ours are mamba_pkd_s1",
        ),
        (with_value(4, *STUDENT, "kwargs", "img_size"), "img_size must be at least 8"),
        (
            with_value(1, *STUDENT, "kwargs", "colours"),
            "model mamba_pkd_ensemble does not take these kwargs: .*'colours'",
        ),
        (with_value(3, *STUDENT, "kwargs", "in_chans"), "model mamba_pkd_ensemble cannot take images of 1x8x8: "),
        (
            with_value(5, *TEACHER, "kwargs", "num_classes"),
            "teacher has 5 classes, student has 3: set both num_classes",
        ),
        (with_value([1, 5], "test", "topk"), "test.topk asks for top-5, but there are 3 classes: set topk: \\[1\\]"),
        (with_value(5, "test", "topk"), "test.topk must be a list of positive integers, got 5"),
        (with_value("residul", *SCHEDULE, "rule"), "unknown rule 'residul'; known: independent, residual"),
        (with_value(0, *SCHEDULE, "num_epochs"), "num_epochs must be an integer of at least 1, got 0"),
        (with_value("CrossEntropy", *TERMS, "ce", "criterion", "key"), "train.stage1: .*CrossEntropy"),
        (without(*TERMS, "ce", "weight"), "train.stage1: 'weight' is missing or unknown"),
        (
            with_value("WeightedSum", *SCHEDULE, "criterion", "key"),
            "train.stage1: No high-level loss `WeightedSum` registered",
        ),
        (with_value("AdamX", *SCHEDULE, "optimizer", "key"), "train.stage1: No optimizer `AdamX` registered"),
        (
            with_value({"key": "StepX", "kwargs": {}}, *SCHEDULE, "scheduler"),
            "train.stage1: No scheduler `StepX` registered",
        ),
        (with_value("high", *SCHEDULE, "optimizer", "kwargs", "lr"), "train.stage1: TypeError: .*'str'"),
        (
            with_value(["mamba_pkd_s1", "mamba_pkd_s2", "mamba_pkd_s3"], *SCHEDULE, "students"),
            "train.stage3: stage 3 has no student: the ensemble has 2",
        ),
        (
            with_value(["mamba_pkd_s1"], *SCHEDULE, "students"),
            "the schedule has 1 stages, but the ensemble has 2 students: give both the same list",
        ),
        (without(*TEACHER), "a progressive schedule needs a teacher: name it under models.teacher_model"),
        (
            with_value({"forward_hook": {"output": ["stages.7"]}}, *SCHEDULE, "student"),
            "train.stage1: student: 'stages.7' is no module of MambaPKD, which has stem, stages, norm, head",
        ),
        (
            with_value({"forward_hook": {"output": ["stages.2.blocks.1"]}}, *SCHEDULE, "student"),  # s2 has it, s1 not
            "train.stage1: student: 'stages.2.blocks.1' is no module",
        ),
        (
            with_value({"forward_hook": {"input": ["layer9.0"]}}, *SCHEDULE, "teacher"),
            "train.stage1: teacher: 'layer9.0' is no module of ResNet, which has conv1, bn1",
        ),
        (
            with_value({"frozen_modules": ["stemm"]}, *SCHEDULE, "student"),
            "train.stage1: student: 'stemm' is no module",
        ),
        (with_value({"sequential": ["stm", "+x"]}, *SCHEDULE, "student"), "train.stage1: student: 'stm' is no module"),
    ],
)
def test_bad_configs(change, message, progressive, run, capsys):
    change(progressive)
    code, folder = run(progressive)
    assert code == 2 and not folder.exists()
    line = error_of(capsys)
    assert re.search(message, line), line


def test_a_path_that_only_a_late_student_lacks(progressive, run, capsys):
    """s2 has a second block in its last stage, s1 has not."""
    names = ["mamba_pkd_s2", "mamba_pkd_s1"]
    progressive["models"]["student_model"]["kwargs"]["students"] = arguments(progressive)["students"] = names
    arguments(progressive)["student"] = {"forward_hook": {"output": ["stages.2.blocks.1"]}}
    code, folder = run(progressive)
    assert code == 2 and not folder.exists()
    assert "train.stage2: student: 'stages.2.blocks.1' is no module" in error_of(capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_value(0, "train", "num_epochs"), "train.stage1 must be a section with num_epochs of at least 1"),
        (without("train", "num_epochs"), "train.stage1 must be a section with num_epochs of at least 1"),
        (without("train", "train_data_loader"), "train has no train_data_loader"),
        (without("train", "val_data_loader"), "train has no val_data_loader"),
        (without("train", "criterion"), "train.stage1: 'criterion' is missing or unknown"),
        (with_value({}, "train", "model"), "train.stage1: "),
        (with_value({"forward_proc": "forward_x"}, "train", "model"), "train.stage1: .*forward_x"),
        (
            with_value({"forward_hook": {"output": ["stm"]}}, "train", "model"),
            "train.stage1: model: 'stm' is no module",
        ),
    ],
)
def test_bad_plain_configs(change, message, plain, run, capsys):
    change(plain)
    code, folder = run(plain)
    assert code == 2 and not folder.exists()
    line = error_of(capsys)
    assert re.search(message, line), line


def test_bad_late_stages(plain, build, run, capsys):
    model = {"forward_proc": "forward_batch_only"}
    good, bad = build.stage(model=model), build.stage(model=model, optimizer={"key": "AdamX", "kwargs": {}})
    plain["train"] = {"log_freq": 1, "stage1": good, "stage2": bad}
    code, folder = run(plain)
    assert code == 2 and not folder.exists()
    assert error_of(capsys) == "train.stage2: No optimizer `AdamX` registered"
    plain["train"] = {"log_freq": 1, "stage1": good, "stage3": good}
    assert run(plain)[0] == 2
    assert "train.stage2 must be a section" in error_of(capsys)


def test_loss_on_what_no_hook_records(plain, run, capsys):
    ce = plain["train"]["criterion"]["kwargs"]["sub_terms"]["ce"]
    ce["criterion_wrapper"]["kwargs"]["input"]["module_path"] = "head.fc"
    assert run(plain)[0] == 2
    assert error_of(capsys) == "a loss reads 'head.fc', which no forward_hook of this stage records"


def test_criterion_without_terms(plain, run, capsys):
    plain["train"]["criterion"]["kwargs"]["sub_terms"] = {}
    assert run(plain)[0] == 2
    assert error_of(capsys) == "criterion has no sub_terms: there is nothing to learn"


def test_data_that_is_not_there(plain, build, run, capsys, tmp_path):
    to_tensor = build.call("torchvision.transforms.ToTensor")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_images" / "cat").mkdir(parents=True)
    for dataset, message in (
        (build.call("torchvision.datasets.ImageFolder", root=str(tmp_path / "gone")), "gone"),
        (
            build.call("torchvision.datasets.ImageFolder", root=str(tmp_path / "empty")),
            "Couldn't find any class folder",
        ),
        (build.call("torchvision.datasets.ImageFolder", root=str(tmp_path / "no_images")), "Found no valid file"),
        (build.call("torchvision.datasets.MNIST", root=str(tmp_path), download=False), "Dataset not found"),
        (build.fake_images(0, 0), "data set 'fake/val' (train.stage1.val_data_loader) is empty"),
        (build.call("torchvision.datasets.FakeData", size=4), "'fake/val': samples must be tensors of shape (C, H, W)"),
        (build.fake_images(4, 0, side=4), "cannot take images of 1x4x4"),
        (build.fake_images(4, 0, classes=99), "classes, the models have 3: set num_classes"),
        (
            build.call("timm_mamba_pkd.datasets.Digits", split="val", transform=to_tensor),
            "the data has at least 10 classes",
        ),
        (build.call("timm_mamba_pkd.datasets.Digits", split="vla"), "split must be train, val or test, got 'vla'"),
        (5, "data set 'fake/val': the first sample cannot be read"),
    ):
        plain["datasets"]["fake/val"] = dataset
        code, folder = run(plain)
        assert code == 2 and not folder.exists()
        line = error_of(capsys)
        assert message in line
        assert "cannot be read: Couldn't" not in line  # that is said of the config file only


def test_labels_beyond_the_classes(plain, build, run, capsys):
    """A data set that declares no classes, whose first label is fine."""

    def labels(offset: int) -> list[int]:
        return [label for _, label in FakeData(24, (1, 8, 8), num_classes=4, random_offset=offset)]

    offset = next(n for n in range(99) if labels(n)[0] < 3)
    assert max(labels(offset)) == 3
    plain["datasets"]["fake/train"] = build.fake_images(24, offset, classes=4)
    assert run(plain)[0] == 2
    assert error_of(capsys) == "the data has label 3, the models have 3 classes: set num_classes"


def test_loader_without_a_batch(plain, run, capsys):
    plain["train"]["train_data_loader"]["kwargs"] = {"batch_size": 64, "drop_last": True}
    code, folder = run(plain)
    assert code == 2 and not folder.exists()
    assert "train.stage1.train_data_loader has no batch" in error_of(capsys)


def test_bad_src_ckpt(progressive, run, capsys, tmp_path):
    teacher = progressive["models"]["teacher_model"]
    path = tmp_path / "teacher.pt"
    teacher["src_ckpt"] = str(path)
    assert run(progressive)[0] == 2
    assert error_of(capsys) == f"weights file {path} does not exist"

    model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    torch.save({"model": model.state_dict()}, path)
    path.write_bytes(path.read_bytes()[:5000])
    assert run(progressive)[0] == 2
    assert f"weights file {path}" in error_of(capsys)

    torch.save({"model": timm.create_model("test_vit", num_classes=3).state_dict()}, path)
    assert run(progressive)[0] == 2
    assert f"weights file {path} is of another model than ResNet" in error_of(capsys)

    torch.save({"model": timm.create_model("test_resnet", num_classes=4, in_chans=1).state_dict()}, path)
    code, folder = run(progressive)
    assert code == 2 and not folder.exists()
    assert "fc.weight (4, 96) instead of (3, 96)" in error_of(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(plain, run, capsys):
    assert run(plain, "--device", "cuda")[0] == 2
    assert error_of(capsys).startswith("device cuda cannot be used: ")


def test_bad_devices(plain, run, capsys):
    for device in ("gpu", "cuda:99"):
        assert run(plain, "--device", device)[0] == 2
        assert error_of(capsys).startswith(f"device {device} cannot be used: ")


def test_several_processes(plain, run, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(plain)[0] == 2
    assert "several processes is not supported yet" in error_of(capsys)


def test_folders_that_cannot_be_written(plain, run, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert run(plain, output="file/run")[0] == 2
    assert error_of(capsys) == f"folder {tmp_path}/file/run cannot be written: Not a directory"
    plain["models"]["model"]["dst_ckpt"] = str(tmp_path / "file" / "model.pt")
    code, folder = run(plain)
    assert code == 2 and not folder.exists()
    assert error_of(capsys).startswith(f"folder {tmp_path}/file cannot be written: ")


def test_loss_that_is_not_finite(plain, run, capsys):
    plain["train"]["criterion"]["kwargs"]["sub_terms"]["ce"]["weight"] = float("nan")
    code, folder = run(plain)
    assert code == 2
    assert error_of(capsys) == "the loss became nan at epoch 1, step 1: lower the lr"
    assert not (folder / "weights").exists()


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_never_overwrites(plain, run, capsys, tmp_path):
    plain["models"]["model"]["dst_ckpt"] = str(tmp_path / "ckpt" / "model.pt")
    _, folder = run(plain)
    capsys.readouterr()
    before = files(folder), files(tmp_path / "ckpt")
    assert len(before[0]) >= 5 and len(before[1]) == 1

    assert run(plain)[0] == 2
    message = f"{folder} already holds a run, finished or not: choose another --output, or move it away"
    assert error_of(capsys) == message
    (folder / "config.yaml").unlink()
    assert run(plain)[0] == 2
    assert error_of(capsys) == message
    (folder / "config.yaml").write_bytes(before[0][folder / "config.yaml"])
    code, other = run(plain, output="other")
    assert code == 2 and not other.exists()
    assert error_of(capsys).startswith(f"dst_ckpt {tmp_path}/ckpt/model.pt exists already: move it away")
    assert before == (files(folder), files(tmp_path / "ckpt"))


def test_a_killed_run_is_not_overwritten(plain, run, write, capsys, tmp_path):
    plain["train"]["num_epochs"] = 100_000
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "timm_mamba_pkd", "train", "--config", str(write(plain))]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--output", str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=output, stderr=output,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 300
            while not (folder / "weights" / "model.safetensors").exists():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    timm.create_model(
        "mamba_pkd_s1", num_classes=3, in_chans=1, checkpoint_path=str(folder / "weights" / "model.safetensors")
    )
    before = files(folder)
    assert run(plain)[0] == 2
    assert "already holds a run" in error_of(capsys)
    assert files(folder) == before
    assert main(["report", str(folder)]) == 2
    assert "has not finished: test it with: mamba-pkd evaluate" in error_of(capsys)


def test_dumped_configs_are_yaml(progressive, write):
    """The tests' own configs: nothing above may fail for another reason than the one that it names."""
    assert "!import_call" in write(progressive).read_text()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(write(progressive).read_text())


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_run_log_that_is_a_directory(command, plain, run, capsys, tmp_path):
    code, folder = run(plain, "--run_log", str(tmp_path), command=command)
    assert code == 2 and not folder.exists()
    assert error_of(capsys) == f"--run_log {tmp_path} is a directory: name a file"
