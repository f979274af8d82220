"""Runs that stop and go on: the same command ends in the same weights, bit for bit, as a run that never stopped."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torchdistill.core.training import TrainingBox
from torchvision.datasets import FakeData

from timm_mamba_pkd.runner import commands
from timm_mamba_pkd.runner import train as training
from timm_mamba_pkd.runner.check import check
from timm_mamba_pkd.runner.checkpoints import Checkpoints
from timm_mamba_pkd.runner.run_folder import RunFolder

pytestmark = pytest.mark.fault

SIDE = {"forward_proc": "forward_batch_only"}


@pytest.fixture
def signal_at(monkeypatch) -> Callable[..., list[int]]:
    """Have a signal sent in the n-th call (from 1) of a method; the counter of the calls is returned."""

    def signal_at(owner: Any, name: str, n: int, number: int = signal.SIGTERM) -> list[int]:
        method, calls = getattr(owner, name), [0]

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == n:
                signal.raise_signal(number)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)
        return calls

    return signal_at


@pytest.fixture
def stop_and_go_on(run, signal_at, assert_same_run) -> Callable[[Any, Path, int], None]:
    """Run a config, stop it in its n-th step, run it again: it must be the same run as another that never stopped."""

    def stop_and_go_on(config: Any, whole: Path, n: int) -> None:
        calls = signal_at(training.Trainer, "_step", n)
        code, folder = run(config, output=f"run{n}")
        assert calls == [n] and code == 143
        assert run(config, output=f"run{n}")[0] == 0
        assert_same_run(whole, folder)

    return stop_and_go_on


def test_progressive_run_goes_on_at_any_step(rich, run, stop_and_go_on):
    code, whole = run(rich, output="whole")
    assert code == 0
    steps = 12 + 6  # a student is trained again
    moments = range(1, steps + 1) if os.environ.get("FAULTS") == "long" else (1, 3, 8, 12, 13, 18)
    for n in moments:
        shutil.rmtree("cache")
        stop_and_go_on(rich, whole, n)


@pytest.mark.parametrize("signals", [[1, 2, 1, 3], [3, 3, 3, 3, 3]])
def test_a_run_that_stops_again_and_again(signals, rich, run, signal_at, assert_same_run, monkeypatch):
    code, whole = run(rich, output="whole")
    assert code == 0
    for n in signals:
        with monkeypatch.context():
            signal_at(training.Trainer, "_step", n, signal.SIGINT)
            assert run(rich)[0] == 130
    monkeypatch.undo()
    monkeypatch.chdir(whole.parent)
    assert run(rich)[0] == 0
    assert_same_run(whole, whole.parent / "run")


def test_checkpoints_between_epochs(rich, run, signal_at, monkeypatch):
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    signal_at(training.Trainer, "_step", 5)
    code, folder = run(rich)
    assert code == 143
    names = sorted(path.name.partition("-")[0] for path in (folder / "checkpoints").glob("stage*"))
    assert names == ["stage1_epoch0002_000000008", "stage1_epoch0002_000000016"]


def test_config_of_torchdistills(plain, run, build, stop_and_go_on):
    """Two stages: a teacher that torchdistill leaves in training mode, so that its batch norms drift, and a student
    with regressors that are trained but belong to no state dict."""
    plain["models"] = {
        "teacher_model": {
            "key": "mamba_pkd_timm_model",
            "kwargs": {"model_name": "resnet18", "num_classes": 3, "in_chans": 1, "small_stem": True},
        },
        "student_model": {
            "key": "mamba_pkd_resnet_taps",
            "kwargs": {"model_name": "mamba_pkd_s1", "num_classes": 3, "in_chans": 1, "img_size": 8},
        },
    }
    sides = {
        role: {"forward_proc": "forward_batch_only", "forward_hook": {"output": ["layer4"]}}
        for role in ("teacher", "student")
    }
    sides["teacher"]["requires_grad"] = False
    hint = {"is_from_teacher": False, "module_path": "layer4", "io": "output"}
    hints = {
        "criterion": {"key": "MSELoss", "kwargs": {"reduction": "mean"}},
        "criterion_wrapper": {
            "key": "SimpleLossWrapper",
            "kwargs": {"input": hint, "target": {**hint, "is_from_teacher": True}},
        },
        "weight": 1.0,
    }
    first = build.stage(**sides)
    first["criterion"]["kwargs"]["sub_terms"]["hint"] = hints
    second = build.stage(**sides)
    second["criterion"]["kwargs"]["sub_terms"]["hint"] = hints
    plain["train"] = {"log_freq": 1, "stage1": first, "stage2": second}
    code, whole = run(plain, output="whole")
    assert code == 0
    for n in (2, 3, 5):
        stop_and_go_on(plain, whole, n)


def test_run_without_a_teacher(plain, run, build, stop_and_go_on, tmp_path):
    """Workers that augment from their own generators; momentum; a plateau that looks back."""
    crop = build.call("torchvision.transforms.RandomCrop", size=8, padding=2)
    to_tensor = build.call("torchvision.transforms.ToTensor")
    transform = build.call("torchvision.transforms.Compose", transforms=[crop, to_tensor])
    plain["datasets"]["fake/train"]["init"]["kwargs"]["transform"] = transform
    plain["models"]["model"]["kwargs"]["drop_path_rate"] = 0.3
    plain["models"]["model"]["dst_ckpt"] = str(tmp_path / "model.safetensors")
    plain["train"] |= {
        "num_epochs": 3,
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1, "momentum": 0.9}},
        "scheduler": {"key": "ReduceLROnPlateau", "kwargs": {"mode": "max", "patience": 0}},
    }
    plain["train"]["train_data_loader"]["kwargs"] |= {"num_workers": 2, "batch_size": 6}
    code, whole = run(plain, output="whole")
    (tmp_path / "model.safetensors").rename(tmp_path / "whole.safetensors")
    assert code == 0
    for n in (1, 5, 12):
        stop_and_go_on(plain, whole, n)
        assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
        (tmp_path / "model.safetensors").unlink()


def test_a_damaged_checkpoint(rich, run, signal_at, assert_same_run):
    code, whole = run(rich, output="whole")
    signal_at(training.Trainer, "_step", 10)
    code, folder = run(rich)
    assert code == 143
    last = sorted((folder / "checkpoints").glob("stage*.pt"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    assert run(rich)[0] == 0
    assert f"Checkpoint {last} is damaged (checksum) and set aside" in (folder / "log.txt").read_text()
    assert_same_run(whole, folder)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "zeroed"])
def test_a_damaged_cache(damage, rich, run, signal_at, assert_same_run):
    code, whole = run(rich, output="whole")
    shutil.rmtree("cache")
    signal_at(training.Trainer, "_step", 5)
    code, folder = run(rich)
    assert code == 143
    for file in Path("cache").rglob("view_*.npy"):
        content = bytearray(file.read_bytes())
        if damage == "truncated":
            content = content[:-5]
        elif damage == "flipped":
            content[-3] ^= 16
        else:
            content = bytearray(len(content))
        file.write_bytes(content)
    assert run(rich)[0] == 0
    assert_same_run(whole, folder)


def test_averaged_float16_run_goes_on(rich, run, signal_at, assert_same_run, tmp_path, monkeypatch):
    flags = ("--model-ema", "--model-ema-decay", "0.7", "--amp", "--amp-dtype", "float16")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    code, whole = run(rich, *flags, output="whole")
    assert code == 0
    monkeypatch.chdir(tmp_path / "other")
    signal_at(training.Trainer, "_step", 14)
    code, folder = run(rich, *flags)
    assert code == 143
    assert run(rich, *flags)[0] == 0
    assert_same_run(whole, folder)


def test_a_loss_that_is_not_finite_stops_the_run(plain, run, errors, monkeypatch):
    nan_in_call(monkeypatch, 5)
    plain["train"]["num_epochs"] = 2
    code, folder = run(plain)
    assert code == 2
    (error,) = errors()
    (last,) = (folder / "checkpoints").glob("stage*.pt")
    start, _, samples = error.partition(" on the samples ")
    assert start == "the loss became nan at epoch 2, step 2"
    assert len(set(samples.partition(";")[0].split(", "))) == 8
    assert error.endswith(f"the last good checkpoint is {last}: lower the lr, or pass over it with --on-nonfinite skip")


def test_a_loss_that_is_not_finite_is_passed_over(plain, run, monkeypatch, caplog):
    nan_in_call(monkeypatch, 2, 3)
    plain["train"]["num_epochs"] = 2
    code, folder = run(plain, "--on-nonfinite", "skip")
    assert code == 0
    skipped = [line for line in (folder / "log.txt").read_text().splitlines() if "Skipped" in line]
    for step, line in zip((2, 3), skipped, strict=True):
        assert f"Skipped a batch: the loss became nan at epoch 1, step {step} on the samples " in line
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < first["loss"] < 10


def test_skipping_gives_up(plain, run, errors, monkeypatch):
    nan_in_call(monkeypatch, *range(2, 100))
    plain["train"]["num_epochs"] = 10
    assert run(plain, "--on-nonfinite", "skip")[0] == 2
    (error,) = errors()
    assert "10 batches of this stage have been skipped before; the last good checkpoint is " in error


def test_what_torchdistill_saves_between_stages_stays(progressive, build, run, signal_at, tmp_path):
    """`student.dst_ckpt` beside the stages is not written again, with the weights that a resumed run begins with."""
    saved = tmp_path / "stage.pt"
    stages = {f"stage{n}": build.stage(teacher={**SIDE, "requires_grad": False}, student=SIDE) for n in (1, 2)}
    progressive["train"] = {"log_freq": 1, "student": {"dst_ckpt": str(saved)}, **stages}
    signal_at(training.Trainer, "_step", 5)
    assert run(progressive)[0] == 143
    before = saved.read_bytes()
    saved.unlink()
    assert run(progressive)[0] == 0
    assert before and not saved.exists()


def nan_in_call(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """The loss is nan in these training steps (from 1); the two steps of the check before do not count."""
    forward, calls = TrainingBox.forward_process, [-2]

    def forward_process(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[0] += 1
        loss = forward(self, *args, **kwargs)
        return loss * float("nan") if calls[0] in numbers else loss

    monkeypatch.setattr(TrainingBox, "forward_process", forward_process)


@pytest.mark.parametrize("part", ["modules", "progress", "optimizer"])
def test_a_checkpoint_of_another_version(plain, run, errors, part):
    _, folder = run(plain)
    (folder / "results.csv").unlink()
    checkpoints = Checkpoints(folder / "checkpoints")
    state = checkpoints.load()
    assert state is not None
    del state[part]
    checkpoints.save(state, 1, 2, 0)
    assert run(plain)[0] == 2
    assert errors() == [
        f"the checkpoint is of another run, or of another version (KeyError: '{part}'): start anew with --fresh"
    ]


def test_two_runs_in_one_folder(plain, run, signal_at, errors, capsys):
    signal_at(training.Trainer, "_step", 2)
    code, folder = run(plain)
    assert code == 143
    capsys.readouterr()
    with FileLock(folder / ".lock"):
        assert run(plain)[0] == 2
        assert errors() == [f"another run is writing in {folder}: wait, or choose another --output"]
        assert run(plain, "--fresh")[0] == 2
    assert run(plain)[0] == 0


@pytest.mark.parametrize("flags", [[], ["--fresh"]])
def test_a_run_that_starts_while_another_is_being_checked(flags, plain, run, errors, monkeypatch, tmp_path):
    """In an empty folder: the files of the one that was first stay as they are."""

    def slow_check(*args: Any, **kwargs: Any) -> Any:
        RunFolder(tmp_path / "run").create("the other's", None, {}, {})
        return check(*args, **kwargs)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(commands, "check", slow_check)
    code, folder = run(plain, *flags)
    assert code == 2 and errors() == [f"another run has just started in {folder}: choose another --output"]
    assert (folder / "config.yaml").read_text() == "the other's" and not (folder / "old-1").exists()


def test_a_run_killed_before_it_trained(plain, run, tmp_path):
    """The command starts it again, whichever of the first files were there."""
    record = '{"flags": {"--seed": 42}, "starts": []}'
    for number, names in enumerate([[], ["run.json"], ["run.json", "expanded.yaml"], [".run.json.1.mamba-pkd.tmp"]]):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        for name in names:
            (folder / name).write_text(record)
        (folder / ".my.tmp").touch()
        assert run(plain, output=folder.name)[0] == 0
        assert [path.name for path in folder.rglob("*.tmp")] == [".my.tmp"]


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"flags": 3}', "{}"])
def test_a_damaged_record(content, plain, run, signal_at, errors, capsys):
    signal_at(training.Trainer, "_step", 2)
    code, folder = run(plain)
    assert code == 143
    capsys.readouterr()
    record = (folder / "run.json").read_text()
    (folder / "run.json").write_text(content)
    assert run(plain)[0] == 2
    advice = "put it back, choose another --output, or start anew with --fresh"
    assert errors() == [f"{folder}/run.json is damaged: {advice}"]
    (folder / "run.json").write_text(record)
    assert run(plain)[0] == 0


@pytest.mark.parametrize("name", ["weights", "checkpoints"])
def test_a_file_in_the_place_of_a_folder(name, plain, run, signal_at, errors, capsys):
    signal_at(training.Trainer, "_step", 2)
    code, folder = run(plain)
    assert code == 143
    capsys.readouterr()
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).write_text("a file")
    assert run(plain)[0] == 2
    assert errors() == [f"{folder / name} is damaged: put it back, choose another --output, or start anew with --fresh"]


def test_inputs_that_changed(progressive, run, build, signal_at, errors, capsys, tmp_path, monkeypatch):
    """The files of a teacher and of a stage, the length of a data set; the config is the same."""
    teacher, later = tmp_path / "teacher.safetensors", tmp_path / "later.safetensors"
    progressive["models"]["teacher_model"]["src_ckpt"] = str(teacher)
    progressive["train"]["init"]["kwargs"]["teacher"] = {"src_ckpt": str(later)}
    for path in (teacher, later):
        build.weights(path, "test_resnet")
    signal_at(training.Trainer, "_step", 2)
    code, folder = run(progressive)
    assert code == 143
    capsys.readouterr()
    began = f"the run in {folder} began with"
    advice = "put back what it began with, choose another --output, or start anew with --fresh"
    content = teacher.read_bytes()
    for path, name in ((teacher, "the teacher"), (later, "train.stage1.teacher.src_ckpt")):
        build.weights(path, "test_resnet", seed=1)
        assert run(progressive)[0] == 2
        (error,) = errors()
        assert error.startswith(f"{began} other weights {'of' if path is teacher else 'in'} {name}") and advice in error
        path.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(FakeData, "__len__", lambda self: self.size - (self.random_offset == 0))
        assert run(progressive)[0] == 2
    assert errors() == [f"{began} 24 samples in data set 'fake/train', not with 23: {advice}"]
    assert run(progressive)[0] == 0


def test_lost_checkpoints_are_said(plain, run, signal_at, caplog):
    signal_at(training.Trainer, "_step", 2)
    code, folder = run(plain)
    assert code == 143
    shutil.rmtree(folder / "checkpoints")
    assert run(plain)[0] == 0
    assert f"The run in {folder} has no checkpoint: it starts from the beginning" in caplog.text


def test_weights_of_an_unfinished_run_are_said_to_be_so(plain, run, signal_at, caplog):
    plain["train"]["num_epochs"] = 2
    signal_at(training.Trainer, "_step", 5)
    code, folder = run(plain)
    assert code == 143
    assert run(plain, command="evaluate")[0] == 0
    assert f"The run in {folder} has not finished: these are its weights so far" in caplog.text
