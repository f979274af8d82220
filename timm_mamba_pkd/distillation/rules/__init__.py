"""Progressive rules, by the name that YAML uses."""

from timm_mamba_pkd.distillation.rules.independent import Independent
from timm_mamba_pkd.distillation.rules.residual import Residual
from timm_mamba_pkd.distillation.rules.rule import Rule

RULES: dict[str, type[Rule]] = {"independent": Independent, "residual": Residual}

__all__ = ["RULES", "Independent", "Residual", "Rule"]
