"""Runs that stop and go on: the same command ends in the same weights, bit for bit, as a run that never stopped."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from timm_mamba_pkd.runner import train as training


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((folder / "weights").iterdir()):
        found |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    return found


def assert_same_run(folder: Path, other: Path) -> None:
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    timeless = [
        [{k: v for k, v in json.loads(line).items() if k not in ("img_per_s", "seconds")} for line in lines]
        for lines in ((f / "metrics.jsonl").read_text().splitlines() for f in (folder, other))
    ]
    assert timeless[0] == timeless[1]


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
def rich(progressive, build, tmp_path) -> dict[str, Any]:
    """Two stages of two epochs that use everything with a state: dropout, momentum, a schedule per step, a rule with
    weights, fitted combination, random augmentation, replayed views, a cache, accumulated gradients."""
    flip = build.call("torchvision.transforms.RandomErasing", p=0.5)
    crop = build.call("torchvision.transforms.RandomCrop", size=8, padding=1)
    to_tensor = build.call("torchvision.transforms.ToTensor")
    transform = build.call("torchvision.transforms.Compose", transforms=[crop, to_tensor, flip])
    progressive["datasets"]["fake/train"]["init"]["kwargs"]["transform"] = transform
    progressive["models"]["student_model"]["kwargs"] |= {"drop_path_rate": 0.2, "combination": "per_student"}
    progressive["train"]["init"]["kwargs"] |= {
        "num_epochs": 2,
        "rule": {"key": "bdistil", "kwargs": {"max_retries": 1, "slack": 0.0}},
        "views": {"num_views": 2, "mixup_alpha": 0.2, "num_classes": 3},
        "cache_dir": str(tmp_path / "cache"),
        "optimizer": {"key": "mamba_pkd_adamw", "kwargs": {"lr": 0.01}, "grad_accum_step": 2},
        "scheduler": {"key": "OneCycleLR", "kwargs": {"max_lr": 0.01, "total_steps": 6}, "scheduling_step": 2},
    }
    return progressive


@pytest.mark.parametrize("n", range(1, 19))
def test_progressive_run_goes_on_at_any_step(n, rich, run, signal_at, monkeypatch):
    code, whole = run(rich, output="whole")
    assert code == 0
    calls = signal_at(training.Trainer, "_step", n)
    code, folder = run(rich)
    if calls[0] < n:
        pytest.fail(f"the run has {calls[0]} steps")
    assert code == 143
    assert run(rich)[0] == 0
    assert_same_run(whole, folder)


@pytest.mark.parametrize("n", [6, 14])
def test_averaged_float16_run_goes_on(n, rich, run, signal_at):
    flags = ("--model-ema", "--model-ema-decay", "0.7", "--amp", "--amp-dtype", "float16")
    code, whole = run(rich, *flags, output="whole")
    assert code == 0
    signal_at(training.Trainer, "_step", n)
    assert run(rich, *flags)[0] == 143
    assert run(rich, *flags)[0] == 0
    assert_same_run(whole, run(rich, *flags)[1])
