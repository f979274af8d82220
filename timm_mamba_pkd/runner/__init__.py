"""Checking, training, evaluation and reporting of torchdistill configs, export: what the ``mamba-pkd`` command runs."""

from timm_mamba_pkd.models import tensors_only
from timm_mamba_pkd.runner.benchmark import run_benchmark
from timm_mamba_pkd.runner.calibrate import run_calibrate
from timm_mamba_pkd.runner.commands import run_check, run_doctor, run_evaluate, run_expand, run_report, run_train
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.export import run_export
from timm_mamba_pkd.runner.interrupts import Interrupted, ending_on_signals
from timm_mamba_pkd.runner.select import run_select

__all__ = [
    "ConfigError",
    "Interrupted",
    "ending_on_signals",
    "run_benchmark",
    "run_calibrate",
    "run_check",
    "run_doctor",
    "run_evaluate",
    "run_expand",
    "run_export",
    "run_report",
    "run_select",
    "run_train",
    "tensors_only",
]
