"""Mamba students for timm, distilled progressively by torchdistill.

Importing this package registers the students and their ensemble with timm, and the progressive schedule with
torchdistill; that is its one side effect.
"""

from timm_mamba_pkd.distillation import progressive
from timm_mamba_pkd.models import MambaPKD, MambaPKDEnsemble
from timm_mamba_pkd.ops import selective_scan

__version__ = "0.1.0"

__all__ = ["MambaPKD", "MambaPKDEnsemble", "progressive", "selective_scan"]
