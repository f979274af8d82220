"""The backends of the selective scan and of the convolution before it, and the choice among them."""

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from timm_mamba_pkd.ops import mamba_ssm, native, parallel, triton_scan

VARIABLE = "TIMM_MAMBA_PKD_SCAN"
_logger = logging.getLogger(__name__)


class Backend(NamedTuple):
    """An implementation. Its arguments are checked, not empty, of any strides and mixed floating dtypes.

    unavailable(device) says why it cannot serve on a device, None if it can.
    saved_shape(u, A) is the shape of what the forward may save for the backward.
    forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save) returns y like ``torch.empty_like(u)``
    and what it saved: a tensor of saved_shape, empty unless ``save``.
    backward(dy, saved, *arguments of forward but save) returns the gradients of the eight tensors, each like
    ``torch.empty_like`` of its tensor, None for an absent one; it does without an empty ``saved``.
    convolve(x, weight, bias, reverse) is ``causal_conv1d_silu``; convolve_backward(dy, *its arguments) gives the
    gradients of its three tensors.
    """

    unavailable: Callable[[torch.device], str | None]
    saved_shape: Callable[[Tensor, Tensor], list[int]]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., list[Tensor | None]]
    convolve: Callable[..., Tensor]
    convolve_backward: Callable[..., list[Tensor | None]]


# In the order in which "auto" tries them. "triton" has not been measured on a GPU yet: behind "parallel", which can
# always serve, it is only taken by name.
BACKENDS: dict[str, Backend] = {
    "native": Backend(
        native.unavailable,
        native.saved_shape,
        native.forward,
        native.backward,
        native.convolve,
        native.convolve_backward,
    ),
    "mamba-ssm": Backend(
        mamba_ssm.unavailable,
        mamba_ssm.saved_shape,
        mamba_ssm.forward,
        mamba_ssm.backward,
        mamba_ssm.convolve,
        mamba_ssm.convolve_backward,
    ),
    "parallel": Backend(
        parallel.unavailable,
        parallel.saved_shape,
        parallel.forward,
        parallel.backward,
        parallel.convolve,
        parallel.convolve_backward,
    ),
    "triton": Backend(
        triton_scan.unavailable,
        triton_scan.saved_shape,
        triton_scan.forward,
        triton_scan.backward,
        triton_scan.convolve,
        triton_scan.convolve_backward,
    ),
}


def resolve(backend: str, device: torch.device) -> Backend:
    """The backend of a name, or for "auto" that of ``TIMM_MAMBA_PKD_SCAN`` or else the first that can serve.

    Raises:
        ValueError: Unknown name, or a backend that cannot serve on ``device``, with the reason.
    """
    name = os.environ.get(VARIABLE) or "auto" if backend == "auto" else backend
    if name == "auto":
        return BACKENDS[_automatic(device.type)]
    if name not in BACKENDS:
        by, others = (f" (by {VARIABLE})", []) if backend == "auto" else ("", ["reference", "exportable"])
        raise ValueError(f"unknown backend {name!r}{by}; choose one of {['auto', *BACKENDS, *others]}")
    reason = BACKENDS[name].unavailable(device)
    if reason is not None:
        raise ValueError(f"the selective scan's backend {name!r} cannot serve: {reason}")
    return BACKENDS[name]


@cache
def _automatic(device: str) -> str:
    """The first backend that can serve, and a line of log on it."""
    reasons = {name: backend.unavailable(torch.device(device)) for name, backend in BACKENDS.items()}
    name = next(name for name, reason in reasons.items() if reason is None)
    fastest = {"cpu": "native", "cuda": "mamba-ssm"}.get(device, name)
    if name != fastest:
        _logger.warning("selective scan on %s: backend %s, the slower one: %s", device, name, reasons[fastest])
    elif device != "meta":
        _logger.info("selective scan on %s: backend %s", device, name)
    return name
