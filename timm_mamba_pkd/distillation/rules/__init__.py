"""Progressive rules, by the name that YAML uses."""

from timm_mamba_pkd.distillation.rules.assistant import Assistant
from timm_mamba_pkd.distillation.rules.bdistil import BDistil
from timm_mamba_pkd.distillation.rules.independent import Independent
from timm_mamba_pkd.distillation.rules.residual import Residual
from timm_mamba_pkd.distillation.rules.rule import RULES, Batch, Rule, Verdict, register_rule

__all__ = [
    "RULES",
    "Assistant",
    "BDistil",
    "Batch",
    "Independent",
    "Residual",
    "Rule",
    "Verdict",
    "register_rule",
]
