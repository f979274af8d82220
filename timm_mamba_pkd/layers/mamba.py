"""The Mamba-1 token mixer."""

import math
from typing import Any, Literal

import torch
from timm.layers import is_exportable
from torch import Tensor, nn

from timm_mamba_pkd.layers.linear import Linear, linear
from timm_mamba_pkd.ops import causal_conv1d_silu, selective_scan

torch.fx.wrap("linear")


class Mamba(nn.Module):
    """Mamba (Gu and Dao, 2023, arXiv:2312.00752) over the tokens of an image in row-major order.

    (B, H, W, C) in, same out, any grid. The parameters have the names, shapes and initialisation of mamba-ssm's
    ``Mamba``. With ``bidirectional=False`` so has the function; otherwise the scan also runs backwards over what the
    convolution and the projections gave, with the same parameters, and the two gated outputs are summed. The state is
    float32 or better under autocast. A mixer made in timm's exportable mode consists of PyTorch's own operators only.

    Args:
        d_model: Channels C.
        d_state: States N of each inner channel.
        d_conv: Kernel size of the depthwise convolution over the sequence.
        expand: Inner channels in multiples of d_model, rounded down.
        dt_rank: Rank of the projection to step sizes; "auto" is d_model / 16, rounded up.
        bidirectional: Scan in both directions.
        dt_min, dt_max: Range of the step sizes at initialisation, log-uniform.
        dt_init_floor: Least step size at initialisation.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        bidirectional: bool = True,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if int(expand * d_model) < 1:
            raise ValueError(f"expand must be at least 1 / d_model = {1 / d_model:g}, got {expand}")
        if dt_rank != "auto" and (isinstance(dt_rank, str) or dt_rank < 1):
            raise ValueError(f"dt_rank must be 'auto' or at least 1, got {dt_rank!r}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min and dt_max must satisfy 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        if dt_init_floor <= 0:
            raise ValueError(f"dt_init_floor must be positive, got {dt_init_floor}")

        self.d_inner = int(expand * d_model)
        self.d_state = d_state
        self.d_conv = d_conv
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.bidirectional = bidirectional
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.backend = "exportable" if is_exportable() else "auto"

        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=False, **dd)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, **dd)
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = Linear(self.dt_rank, self.d_inner, **dd)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(self.d_inner, **dd))
        self.out_proj = Linear(self.d_inner, d_model, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter in place, from torch's random state, and mark those that must not decay."""
        for module in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            module.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        log_dt = torch.empty_like(self.dt_proj.bias, dtype=torch.float32)
        dt = log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp().clamp(min=self.dt_init_floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.D.fill_(1)
        for parameter in (self.A_log, self.D, self.dt_proj.bias):
            parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        tokens = x.reshape(batch, height * width, channels)
        x, z = self.in_proj(tokens).chunk(2, dim=2)
        x, z = x.transpose(1, 2), z.transpose(1, 2)
        x = causal_conv1d_silu(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, backend=self.backend)
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=2)
        delta = linear(dt, self.dt_proj.weight).transpose(1, 2)
        B, C = B.transpose(1, 2), C.transpose(1, 2)
        y = self._scan(x, delta, B, C, z, reverse=False)
        if self.bidirectional:
            y = y + self._scan(x, delta, B, C, z, reverse=True)
        return self.out_proj(y.transpose(1, 2)).reshape(batch, height, width, channels)

    def _scan(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor, reverse: bool) -> Tensor:
        """Scan and gate in one direction: x, delta, z (batch, inner channels, length) in, same out."""
        A = -torch.exp(self.A_log.float())
        bias = self.dt_proj.bias
        return selective_scan(
            x, delta, A, B, C, self.D, z, bias, delta_softplus=True, reverse=reverse, backend=self.backend
        )
