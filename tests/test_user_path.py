"""The package as a user installs it: a wheel of this checkout, alone in a fresh environment, takes user_path.py."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_from_installation_to_onnx_runtime(tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    sources = tmp_path / "sources"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "timm_mamba_pkd", sources / "timm_mamba_pkd", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    offline = ["--no-index", "--no-deps", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", *offline, "--no-build-isolation", "-w", tmp_path, sources, cwd=tmp_path)
    (wheel,) = tmp_path.glob("timm_mamba_pkd-*.whl")

    run(sys.executable, "-m", "venv", "fresh", cwd=tmp_path)
    fresh = tmp_path / "fresh"
    (site,) = fresh.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch, timm and the rest
    run(fresh / "bin" / "pip", "install", *offline, "--ignore-installed", wheel, cwd=tmp_path)
    shutil.copy(ROOT / "tests" / "user_path.py", tmp_path)
    assert "the user's path works" in run(fresh / "bin" / "python", "user_path.py", cwd=tmp_path)
