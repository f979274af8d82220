"""The selective scan, the convolution before it, and their backends."""

from timm_mamba_pkd.ops.backends import BACKENDS, Backend
from timm_mamba_pkd.ops.causal_conv1d import causal_conv1d_silu
from timm_mamba_pkd.ops.selective_scan import selective_scan

__all__ = ["BACKENDS", "Backend", "causal_conv1d_silu", "selective_scan"]
