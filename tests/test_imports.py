"""The floors of the package, as import-linter contracts in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run([sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True)


def test_contracts_hold():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("ops/__init__.py", "import timm_mamba_pkd.models", "A room imports only from floors below it"),
        ("ops/__init__.py", "import timm", "The lowest floor stands on torch, not on timm"),
        ("report/__init__.py", "import torchdistill", "Only distillation and the runner know torchdistill"),
        (
            "runner/__init__.py",
            "from torchdistill.models.registry import get_model",
            "Only distillation knows torchdistill's registries",
        ),
        ("new_room.py", "", "A room imports only from floors below it"),
    ],
)
def test_contracts_can_fail(tmp_path, module, statement, contract):
    shutil.copytree(ROOT / "timm_mamba_pkd", tmp_path / "timm_mamba_pkd")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "timm_mamba_pkd" / module, "a") as file:
        file.write(f"\n{statement}\n")
    result = lint_imports(tmp_path)
    assert result.returncode != 0
    assert f"{contract} BROKEN" in result.stdout
