"""The Mamba block of the students."""

from collections import OrderedDict
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from timm_mamba_pkd.layers.linear import Linear
from timm_mamba_pkd.layers.mamba import Mamba


class MambaBlock(nn.Module):
    """Depthwise 3x3, bidirectional Mamba and MLP, each on a residual branch: (B, H, W, C) in, same out.

    The depthwise convolution gives tokens their neighbours above and below, which a row-major scan meets late; its
    zero padding tells them where they are, so there are no position embeddings and any grid works.

    Args:
        dim: channels C.
        d_state, expand: state size N and inner width (in multiples of ``dim``) of the mixer.
        mlp_ratio: hidden width of the MLP in multiples of ``dim``.
        drop_path: probability that a residual branch is dropped for a sample.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        expand: float,
        mlp_ratio: float,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = Mamba(dim, d_state=d_state, expand=expand, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        hidden = int(dim * mlp_ratio)
        layers = {"fc1": Linear(dim, hidden, **dd), "act": nn.SiLU(), "fc2": Linear(hidden, dim, **dd)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.local(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
