"""Linear layers that are fast on every CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.fx.wrap
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of x (..., C), as a 1x1 convolution where that is faster: in float32 on a CPU, if it is large.

    There PyTorch multiplies matrices with MKL, which on AMD's processors is slower than oneDNN, the library of its
    convolutions; but a convolution takes longer to begin. In bfloat16 both are oneDNN's.
    """
    convolves = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.dim() > 1
    if not torch.jit.is_scripting():
        convolves = convolves and not (torch.compiler.is_exporting() or torch.is_autocast_enabled("cpu"))
    if not convolves or x.numel() * weight.shape[0] < 2**22:
        return F.linear(x, weight, bias)
    rows = x.reshape(x.shape[0], 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # channels-last
    y = F.conv2d(rows, weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return y.reshape(list(x.shape[:-1]) + [weight.shape[0]])  # noqa: RUF005 - TorchScript has no unpacking


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
