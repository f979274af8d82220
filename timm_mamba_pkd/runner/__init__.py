"""Checking, training, evaluation and reporting of torchdistill configs, export: what the ``mamba-pkd`` command runs."""

from timm_mamba_pkd.models import tensors_only
from timm_mamba_pkd.runner.benchmark import run_benchmark
from timm_mamba_pkd.runner.commands import run_check, run_doctor, run_evaluate, run_expand, run_report, run_train
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.export import run_export

__all__ = [
    "ConfigError",
    "run_benchmark",
    "run_check",
    "run_doctor",
    "run_evaluate",
    "run_expand",
    "run_export",
    "run_report",
    "run_train",
    "tensors_only",
]
