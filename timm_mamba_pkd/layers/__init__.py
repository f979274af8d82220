"""Token mixers and blocks: (B, H, W, C) in, same out."""

from timm_mamba_pkd.layers.block import MambaBlock
from timm_mamba_pkd.layers.conv import ConvNorm, Downsample, InvertedResidual
from timm_mamba_pkd.layers.mamba import Mamba

__all__ = ["ConvNorm", "Downsample", "InvertedResidual", "Mamba", "MambaBlock"]
