"""The selective scan, the convolution before it, and their backends."""

from timm_mamba_pkd.ops.backends import BACKENDS, VARIABLE, Backend, resolve
from timm_mamba_pkd.ops.causal_conv1d import causal_conv1d_silu
from timm_mamba_pkd.ops.selective_scan import selective_scan

__all__ = ["BACKENDS", "VARIABLE", "Backend", "causal_conv1d_silu", "resolve", "selective_scan"]
