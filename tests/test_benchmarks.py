"""The benchmarks find what they import, and the peers are what they are said to be: nothing else runs them."""

import importlib
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from timm_mamba_pkd.models import count_macs

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    assert module(file, monkeypatch).__doc__


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("shufflenet_v2_x0_5", 0.352, 10.9), ("mobilenetv2_050", 0.700, 28.0), ("convolutions", 0.241, 10.9)],
)
def test_peers(name, params, macs, monkeypatch):
    peers = module(ROOT / "benchmarks" / "accuracy" / "peers.py", monkeypatch)
    ensemble: Any = timm.create_model("mamba_pkd_ensemble", students=[f"peer_{name}"], num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ensemble(x), ensemble.students[0](x))
    assert sum(p.numel() for p in ensemble.parameters()) / 1e6 == pytest.approx(params, abs=0.001)
    assert count_macs(ensemble.students[0], (3, 32, 32)) / 1e6 == pytest.approx(macs, abs=0.2)
    for config in ("student_ce", "progressive_residual"):
        text = (ROOT / "yaml_configs" / "cifar10" / f"{config}.yaml").read_text()
        changed = peers.with_model(text, f"peer_{name}")
        assert f"'peer_{name}'" in changed and "mamba_pkd_s" not in changed


def test_configs_that_do_not_fit_are_said_to_be_so(monkeypatch):
    text = (ROOT / "yaml_configs" / "cifar10" / "teacher_resnet18.yaml").read_text()
    peers = module(ROOT / "benchmarks" / "accuracy" / "peers.py", monkeypatch)
    rules = module(ROOT / "benchmarks" / "rules.py", monkeypatch)
    with pytest.raises(SystemExit, match=r"must name one of s1 to s7.*this one has 0"):
        peers.with_model(text, "peer_convolutions")
    with pytest.raises(SystemExit, match="one rule and one criterion"):
        rules.variant_of(text, "residual", {})
    with pytest.raises(SystemExit, match="must read torchvision's CIFAR10"):
        peers.reading_folders("datasets: {}", Path("data"))


def test_combinations_are_fitted_on_the_other_half(monkeypatch):
    combinations = module(ROOT / "benchmarks" / "combinations.py", monkeypatch)
    targets = torch.arange(2000) % 4
    good, bad = torch.randn(2, 2000, 4, generator=torch.Generator().manual_seed(0))
    logits = torch.stack([good + 3 * torch.nn.functional.one_hot(targets, 4), 10 * bad])
    alone = 100 * float((logits[0].argmax(-1) == targets).double().mean())
    assert combinations.top1(logits[:1], targets, "mean") == pytest.approx(alone) and alone > 90
    assert combinations.top1(logits, targets, "mean") < 50
    for name in ("per_student", "per_class"):
        assert combinations.top1(logits, targets, name) == pytest.approx(alone, abs=1)
    noise = 30 * torch.randn(50, 400, 4, generator=torch.Generator().manual_seed(0))
    chance = combinations.top1(
        noise, targets[torch.randperm(400, generator=torch.Generator().manual_seed(1))], "per_class"
    )
    assert chance < 40  # weights fitted on the very labels that they predict are right for 70 %


def test_a_split_that_a_run_has_not_is_said_to_be_so(monkeypatch):
    runs = module(ROOT / "benchmarks" / "runs.py", monkeypatch)
    run = SimpleNamespace(datasets={"mnist/train": [], "mnist/val": [1]})
    assert runs.dataset_of(run, "mnist/val", Path("run")) == [1]
    with pytest.raises(SystemExit, match="config of run has no data set 'mnist/vla'; it has mnist/train, mnist/val"):
        runs.dataset_of(run, "mnist/vla", Path("run"))


def test_a_run_that_fails_ends_with_its_last_line(tmp_path, monkeypatch):
    runs = module(ROOT / "benchmarks" / "runs.py", monkeypatch)
    with pytest.raises(SystemExit, match=r"error: config .*run\.yaml.*\n\(the end of .*run\.log\)"):
        runs.train("models: {}\n", tmp_path / "run", [])


def test_an_interrupt_lets_the_run_save(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nsleep 2\ntouch {tmp_path}/saved\n")
    python.chmod(0o755)
    runs = module(ROOT / "benchmarks" / "runs.py", monkeypatch)
    monkeypatch.setattr(runs.sys, "executable", str(python))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    interrupt = threading.Thread(target=interrupt_once_there_is, args=[tmp_path / "begun"], daemon=True)
    interrupt.start()
    with pytest.raises(SystemExit, match=r"interrupted; the same command goes on .*run\.log"):
        runs.train("", tmp_path / "run", [])
    interrupt.join()
    signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists()


def interrupt_once_there_is(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def module(file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
