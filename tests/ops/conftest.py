from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_mamba_pkd.ops import mamba_ssm
from timm_mamba_pkd.ops.reference import selective_scan_reference


@pytest.fixture(autouse=True)
def mamba_ssm_without_cuda(request, monkeypatch) -> None:
    """Where a test's ``backend`` is mamba-ssm, that has fake kernels for the CPU."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "mamba-ssm":
        monkeypatch.setattr(mamba_ssm, "DEVICE", "cpu")
        monkeypatch.setattr(mamba_ssm, "_load", lambda: FAKE_KERNELS)


@pytest.fixture
def fake_kernels() -> mamba_ssm.Kernels:
    """The functions of mamba-ssm and causal-conv1d on the CPU, which refuse what the real ones would misread."""
    return FAKE_KERNELS


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
) -> Tensor:
    assert not return_last_state
    for sequence in (u, delta, B, C, z):
        assert sequence is None or (sequence.dtype == u.dtype and (sequence.stride(-1) == 1 or sequence.shape[-1] == 1))
    assert u.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert all(x is None or (x.dtype == torch.float32 and x.is_contiguous()) for x in (A, D, delta_bias))
    assert A.shape[1] <= 256

    def formula(*tensors: Tensor) -> Tensor:
        return selective_scan_reference(*tensors, delta_softplus=delta_softplus)

    return _Formula.apply(formula, u, delta, A, B, C, D, z, delta_bias)


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
) -> Tensor:
    assert (seq_idx, initial_states, return_final_states, final_states_out) == (None, None, False, None)
    assert activation == "silu"
    assert x.dtype in (torch.float32, torch.float16, torch.bfloat16) and 2 <= weight.shape[1] <= 4
    assert x.stride(2) == 1 or x.stride(1) == 1
    if x.stride(1) == 1 and x.stride(2) > 1:
        assert x.shape[1] % 8 == x.stride(2) % 8 == x.stride(0) % 8 == 0
    assert bias is None or (bias.dtype == weight.dtype and bias.stride(0) == 1)

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv1d(x.float(), weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
        return F.silu(y[:, :, : x.shape[2]]).to(x.dtype)

    return _Formula.apply(formula, x, weight, bias)


class _Formula(torch.autograd.Function):
    """A formula and its gradients, computed where no dispatch key is excluded, as in a kernel: in another thread."""

    @staticmethod
    def forward(ctx: Any, formula: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        for x in tensors:
            assert x is None or (not x.is_neg() and x.data_ptr() % 16 == 0)
        ctx.formula = formula
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0]).copy_(formula(*tensors))  # pyright: ignore[reportArgumentType]

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        assert dy[0].dtype == ctx.saved_tensors[0].dtype and not dy[0].is_neg() and dy[0].data_ptr() % 16 == 0

        def differentiate() -> tuple[Tensor, ...]:
            leaves = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
            return torch.autograd.grad(ctx.formula(*leaves), [x for x in leaves if x is not None], dy)

        with ThreadPoolExecutor(1) as thread:
            grads = iter(thread.submit(differentiate).result())
        return None, *(None if x is None else next(grads) for x in ctx.saved_tensors)


FAKE_KERNELS = mamba_ssm.Kernels(selective_scan_fn, causal_conv1d_fn)
