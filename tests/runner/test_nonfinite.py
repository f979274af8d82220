"""Training images that are not finite: what they leave in a run that stops at them, or passes over them."""

from typing import Any

import pytest
import torch
from torchvision.datasets import FakeData

from timm_mamba_pkd.runner import train as training
from timm_mamba_pkd.runner.training_state import tensors


@pytest.fixture
def poisoned(monkeypatch) -> set[int]:
    """The numbers of the training images that are NaN: 7."""
    numbers, make = {7}, FakeData.__getitem__

    def getitem(self: FakeData, index: int) -> tuple[Any, Any]:
        image, label = make(self, index)
        return image * float("nan") if index in numbers and self.random_offset == 0 else image, label

    monkeypatch.setattr(FakeData, "__getitem__", getitem)
    return numbers


@pytest.fixture
def skipped(monkeypatch) -> list[bool]:
    """For each step whose batch was skipped: whether all tensors were as before."""
    found, step = [], training.Trainer._step

    def checked(self: training.Trainer, *batch: Any) -> float:
        before = [tensor.clone() for tensor in tensors(self.job, self.box)]
        loss = step(self, *batch)
        if loss != loss:
            now = tensors(self.job, self.box)
            found.append(all(torch.equal(one, other) for one, other in zip(before, now, strict=True)))
        return loss

    monkeypatch.setattr(training.Trainer, "_step", checked)
    return found


@pytest.mark.parametrize("flags", [[], ["--model-ema"], ["--amp", "--amp-dtype", "float16"]])
def test_a_skipped_image_leaves_nothing(plain, run, poisoned, skipped, flags):
    plain["train"]["num_epochs"] = 2
    code, _ = run(plain, "--on-nonfinite", "skip", *flags)
    assert code == 0 and skipped == [True, True]


@pytest.mark.parametrize("schedule", [{}, {"cache_dir": "cache", "views": {"num_views": 1}}])
def test_a_schedule_with_a_skipped_image(progressive, run, poisoned, skipped, schedule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    progressive["train"]["init"]["kwargs"] |= schedule
    code, _ = run(progressive, "--on-nonfinite", "skip")
    assert code == 0 and skipped == [True, True]


def test_the_first_batch_may_be_skipped(plain, run, poisoned, skipped, caplog, errors):
    poisoned |= {0}
    plain["train"]["train_data_loader"]["sampler"] = plain["train"]["val_data_loader"]["sampler"]  # in order
    assert run(plain)[0] == 2
    assert errors()[0].endswith("train.stage1: the loss of the first batch is nan")
    code, _ = run(plain, "--on-nonfinite", "skip")
    assert code == 0 and skipped == [True]
    assert "train.stage1: the loss of the first batch is nan: such batches are skipped" in caplog.messages


def test_statistics_that_are_not_finite_are_not_saved(plain, run, errors, monkeypatch):
    step = training.Trainer._step

    def damaging(self: training.Trainer, *batch: Any) -> float:
        loss = step(self, *batch)
        self.job.student.get_buffer("stem.norm.running_var")[1] = float("inf")
        return loss

    monkeypatch.setattr(training.Trainer, "_step", damaging)
    code, folder = run(plain)
    assert code == 2
    assert errors() == ["no longer finite at epoch 1: stem.norm.running_var; there is no checkpoint yet"]
    assert not (folder / "weights").exists()
