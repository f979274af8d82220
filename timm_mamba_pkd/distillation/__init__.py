"""The progressive schedule in torchdistill's terms; importing this package fills torchdistill's registries."""

from torchdistill.models.registry import register_model

from timm_mamba_pkd.distillation.bridges import build_model, unknown_name, weights_file
from timm_mamba_pkd.distillation.logits_cache import CacheError
from timm_mamba_pkd.distillation.procs import finish_stage
from timm_mamba_pkd.distillation.progressive import progressive
from timm_mamba_pkd.distillation.resnet_taps import ResNetTaps
from timm_mamba_pkd.distillation.rules import RULES, Batch, Rule, Verdict, build_rule
from timm_mamba_pkd.distillation.stage import StageWrapper
from timm_mamba_pkd.models import mamba_pkd_ensemble

register_model(mamba_pkd_ensemble)

__all__ = [
    "RULES",
    "Batch",
    "CacheError",
    "ResNetTaps",
    "Rule",
    "StageWrapper",
    "Verdict",
    "build_model",
    "build_rule",
    "finish_stage",
    "progressive",
    "unknown_name",
    "weights_file",
]
