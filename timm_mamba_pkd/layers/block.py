"""The Mamba block of the students."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from timm_mamba_pkd.layers.conv import InvertedResidual
from timm_mamba_pkd.layers.mamba import Mamba


class MambaBlock(nn.Module):
    """Bidirectional Mamba on a residual branch and an inverted residual: (B, H, W, C) in, same out.

    The mixer lets every token see every other; the inverted residual's depthwise convolution gives tokens their
    neighbours above and below, which a row-major scan meets late. Its zero padding tells them where they are, so there
    are no position embeddings and any grid works.

    Args:
        dim: channels C.
        d_state, expand: state size N and inner width (in multiples of ``dim``) of the mixer.
        drop_path: probability that a residual branch is dropped for a sample.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        expand: float,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.mixer = Mamba(dim, d_state=d_state, expand=expand, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.local = InvertedResidual(dim, dim, drop_path=drop_path, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.local(x + self.drop_path(self.mixer(self.norm(x))))
