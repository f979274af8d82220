"""Checking, training, evaluation and reporting of torchdistill configs: what the ``mamba-pkd`` command runs."""

from timm_mamba_pkd.runner.commands import run_check, run_doctor, run_evaluate, run_expand, run_report, run_train
from timm_mamba_pkd.runner.errors import ConfigError

__all__ = ["ConfigError", "run_check", "run_doctor", "run_evaluate", "run_expand", "run_report", "run_train"]
