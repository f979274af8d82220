"""`import timm` alone knows the students, in every import order, and nothing breaks when it cannot."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytestmark = pytest.mark.skipif(
    not any(point.value == "timm_mamba_pkd_autoload:install" for point in entry_points(group="torch.backends")),
    reason="the distribution is not installed: pip install -e .",
)


def run_python(folder, code: str, **environment: str) -> str:
    """Runs the code in a fresh interpreter in `folder`, outside of the checkout; returns what it logged."""
    ours = {"TIMM_MAMBA_PKD_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONPATH"}
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=inherited | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import timm",
        "import torch, sys; assert not {'timm', 'timm_mamba_pkd'} & set(sys.modules); import timm",
        "import timm_mamba_pkd, timm",
    ],
)
def test_import_orders(tmp_path, imports):
    log = run_python(tmp_path, f"{imports}; timm.create_model('mamba_pkd_s3')")
    assert "timm_mamba_pkd" not in log


def test_torch_switch_and_installing_by_hand(tmp_path):
    code = """
import torch, sys
assert "timm_mamba_pkd_autoload" not in sys.modules
from timm_mamba_pkd_autoload import install
finders = len(sys.meta_path)
install()
install()
assert len(sys.meta_path) == finders + 1
import timm.models
assert len(sys.meta_path) == finders
assert timm.models.is_model("mamba_pkd_s3")
"""
    run_python(tmp_path, code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_own_switch_and_installing_late(tmp_path):
    code = """
import os, timm
assert not timm.is_model("mamba_pkd_s3")
del os.environ["TIMM_MAMBA_PKD_AUTOLOAD"]
from timm_mamba_pkd_autoload import install
install()
assert timm.is_model("mamba_pkd_s3")
"""
    run_python(tmp_path, code, TIMM_MAMBA_PKD_AUTOLOAD="0")


def test_broken_plugin_is_named_and_harmless(tmp_path):
    package = tmp_path / "timm_mamba_pkd"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('no such kernel')")
    log = run_python(tmp_path, "import timm; timm.create_model('resnet18')", PYTHONPATH=str(tmp_path))
    (line,) = [line for line in log.splitlines() if "timm_mamba_pkd" in line]
    assert "no such kernel" in line
