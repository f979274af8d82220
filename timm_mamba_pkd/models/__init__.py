"""Students and their ensemble, registered with timm when this package is imported."""

from timm_mamba_pkd.models.cascade import Prediction
from timm_mamba_pkd.models.ensemble import MambaPKDEnsemble, mamba_pkd_ensemble
from timm_mamba_pkd.models.macs import count_macs
from timm_mamba_pkd.models.mamba_pkd import STUDENTS, MambaPKD
from timm_mamba_pkd.models.policies import MEASURES, Agreement, Budget, Confidence, Depth, Policy, confidence
from timm_mamba_pkd.models.weights import (
    WeightsError,
    load_state,
    load_weights,
    read_weights,
    save_checkpoint,
    save_weights,
    tensors_only,
)

__all__ = [
    "MEASURES",
    "STUDENTS",
    "Agreement",
    "Budget",
    "Confidence",
    "Depth",
    "MambaPKD",
    "MambaPKDEnsemble",
    "Policy",
    "Prediction",
    "WeightsError",
    "confidence",
    "count_macs",
    "load_state",
    "load_weights",
    "mamba_pkd_ensemble",
    "read_weights",
    "save_checkpoint",
    "save_weights",
    "tensors_only",
]
