"""The convolution in front of the scan, for every backend, against its formula in float64."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from timm_mamba_pkd.ops import BACKENDS, causal_conv1d_silu, native

INSTRUCTION_SETS = [f"native: {name}" for name in native.INSTRUCTION_SETS]
OPERATORS = pytest.mark.parametrize("backend", [*BACKENDS, *INSTRUCTION_SETS], indirect=True)
EVERY_BACKEND = pytest.mark.parametrize("backend", ["exportable", *BACKENDS, *INSTRUCTION_SETS], indirect=True)


def make_inputs(batch=2, channels=3, length=9, width=4, dtype=torch.float32, bias=True) -> list[Any]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, channels, length), (channels, width), (channels,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes[: 2 + bias]]


def expected(x: Tensor, weight: Tensor, bias: Tensor | None = None, reverse: bool = False) -> Tensor:
    """y_t = silu(bias + sum over k of weight_k x_{t - width + 1 + k}), term by term."""
    if reverse:
        return expected(x.flip(-1), weight, bias).flip(-1)
    width, terms = weight.shape[1], []
    for t, k in itertools.product(range(x.shape[2]), range(width)):
        past = t - width + 1 + k
        terms.append(weight[:, k] * x[:, :, past] if past >= 0 else torch.zeros_like(x[:, :, 0]))
    y = torch.stack(terms, -1).unflatten(-1, (x.shape[2], width)).sum(-1)
    return F.silu(y if bias is None else y + bias[:, None])


def check(inputs: list[Any], backend: str, reverse: bool, tolerance: float = 2e-6) -> None:
    true_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    true_y = expected(*true_inputs, reverse=reverse)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    y = causal_conv1d_silu(*inputs, reverse=reverse, backend=backend)
    assert y.dtype == inputs[0].dtype and y.shape == inputs[0].shape
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    grads = torch.autograd.grad(y, inputs, dy)
    true_grads = torch.autograd.grad(true_y, true_inputs, dy.double())
    assert [grad.dtype for grad in grads] == [tensor.dtype for tensor in inputs]
    for actual, true in zip([y, *grads], [true_y, *true_grads], strict=True):
        error = (actual - true).abs().max() / true.abs().max()
        assert error < tolerance


@EVERY_BACKEND
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 5])
@pytest.mark.parametrize(("channels", "length"), [(1, 1), (3, 2), (17, 9), (40, 63)])
def test_sizes(backend, channels, length, width, reverse):
    check(make_inputs(channels=channels, length=length, width=width), backend, reverse)


@EVERY_BACKEND
@pytest.mark.parametrize("reverse", [False, True])
def test_strides_dtypes_and_no_bias(backend, reverse):
    x, weight = make_inputs(channels=17, bias=False)
    check([x.transpose(1, 2).contiguous().transpose(1, 2), weight], backend, reverse)
    check([x.repeat_interleave(2, -1)[..., ::2], weight.T.contiguous().T], backend, reverse)
    check([x[:1].expand(4, -1, -1), weight], backend, reverse)
    check([x.double(), weight.double()], backend, reverse, 1e-14)
    check([x.bfloat16(), weight], backend, reverse, 0.02)
    check([x.half(), weight.half()], backend, reverse, 0.002)


@EVERY_BACKEND
def test_empty(backend):
    x, weight, bias = make_inputs()
    for empty in (x[:0], x[:, :, :0]):
        assert causal_conv1d_silu(empty, weight, bias, backend=backend).shape == empty.shape


@EVERY_BACKEND
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, torch.ones(3, 9), r"x must be \(batch, channels, length\), got shape \[3, 9\]"),
        (0, torch.ones(2, 3, 9, dtype=torch.int64), "x must be a real floating tensor, got torch.int64"),
        (1, torch.ones(3, 1, 4), r"weight must be \(channels, width\) = \(3, at least 1\), got shape \[3, 1, 4\]"),
        (1, torch.ones(2, 4), r"weight must be .*got shape \[2, 4\]"),
        (2, torch.ones(4), r"bias must be \(channels,\) = \[3\], got shape \[4\]"),
        (2, torch.ones(3, dtype=torch.complex64), "bias must be a real floating tensor, got torch.complex64"),
    ],
)
def test_bad_tensors(backend, device, position, bad, message):
    inputs = make_inputs()
    inputs[position] = bad
    with pytest.raises(ValueError, match=message):
        causal_conv1d_silu(*[tensor.to(device) for tensor in inputs], backend=backend)


@OPERATORS
def test_opcheck(backend):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(dtype=torch.float64)]
    op = torch.ops.timm_mamba_pkd
    torch.library.opcheck(op.causal_conv1d_silu.default, (*inputs, True, backend))
    detached = [tensor.detach() for tensor in (inputs[0], *inputs)]
    torch.library.opcheck(op.causal_conv1d_silu_backward.default, (*detached, False, backend))


@EVERY_BACKEND
def test_gradcheck(backend):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda x, weight, bias: causal_conv1d_silu(x, weight, bias, False, backend), inputs)


@OPERATORS
def test_flops_are_those_of_the_convolution(backend):
    inputs = [tensor.requires_grad_() for tensor in make_inputs()]
    with FlopCounterMode(display=False) as counter:
        y = causal_conv1d_silu(*inputs, backend=backend)
    assert counter.get_total_flops() == 2 * 2 * 3 * 9 * 4
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 2 * 3 * 9 * 4
