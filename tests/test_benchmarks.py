"""The benchmarks find what they import, and the peers are what they are said to be: nothing else runs them."""

import importlib
from pathlib import Path
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


def module(file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
