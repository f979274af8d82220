"""Convolutional parts for small images: inverted residuals and separable downsampling."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm, and optionally SiLU: (B, C, H, W) in, (B, C', H', W') out."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding, groups=groups, bias=False, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)
        if act:
            self.act = nn.SiLU()


class InvertedResidual(nn.Module):
    """Inverted residual of MobileNetV2 (arXiv 1801.04381), channels last: (B, H, W, C) in, (B, H', W', C') out.

    The grid is divided by the stride, rounded up. The input is added where neither grid nor channels change.

    Args:
        in_dim, out_dim: channels C and C'.
        stride: of the depthwise 3x3 convolution.
        expand: width of the depthwise convolution, in multiples of ``in_dim``.
        drop_path: probability that the residual branch is dropped for a sample.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        stride: int = 1,
        expand: float = 2.0,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        hidden = int(in_dim * expand)
        self.has_skip = stride == 1 and in_dim == out_dim
        self.expand = ConvNorm(in_dim, hidden, **dd)
        self.depthwise = ConvNorm(hidden, hidden, 3, stride, groups=hidden, **dd)
        self.project = ConvNorm(hidden, out_dim, act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        return x + self.drop_path(y) if self.has_skip else y


class Downsample(nn.Module):
    """Halve the grid by a separable convolution: (B, H, W, C) in, (B, ceil(H / 2), ceil(W / 2), C') out."""

    def __init__(self, in_dim: int, out_dim: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.depthwise = ConvNorm(in_dim, in_dim, 3, stride=2, groups=in_dim, act=False, **dd)
        self.pointwise = ConvNorm(in_dim, out_dim, act=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
