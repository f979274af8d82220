"""The selective scan and its backends."""

from timm_mamba_pkd.ops.selective_scan import BACKENDS, Backend, selective_scan

__all__ = ["BACKENDS", "Backend", "selective_scan"]
