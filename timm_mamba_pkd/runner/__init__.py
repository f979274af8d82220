"""Training, evaluation and reporting of torchdistill configs: what the ``mamba-pkd`` command runs."""

from timm_mamba_pkd.runner.commands import run_evaluate, run_report, run_train
from timm_mamba_pkd.runner.config import ConfigError

__all__ = ["ConfigError", "run_evaluate", "run_report", "run_train"]
