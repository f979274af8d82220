"""The contract of the selective scan, for every backend; errors are the largest, relative to the largest true value."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from timm_mamba_pkd.ops import BACKENDS, native, selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
OPTIONAL = ("D", "z", "delta_bias")
INSTRUCTION_SETS = [f"native: {name}" for name in native.INSTRUCTION_SETS]
EVERY_BACKEND = pytest.mark.parametrize(
    "backend", ["reference", "exportable", *BACKENDS, *INSTRUCTION_SETS], indirect=True
)
Inputs = dict[str, Any]


def make_inputs(batch=2, channels=3, length=9, states=5, dtype=torch.float32, without=()) -> Inputs:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length),
        "A": -normal(channels, states).exp(),
        "B": normal(batch, states, length),
        "C": normal(batch, states, length),
        "D": normal(channels),
        "z": normal(batch, channels, length),
        "delta_bias": normal(channels),
    }
    return {name: tensor for name, tensor in inputs.items() if name not in without}


def expected(inputs: Inputs, delta_softplus=False, reverse=False) -> Tensor:
    """The recurrence unrolled: y_t sums over every s <= t what is left of s, exp(A (delta_{s+1} + ... + delta_t))."""
    u, delta, A, B, C = (inputs[name] for name in NAMES[:5])
    if "delta_bias" in inputs:
        delta = delta + inputs["delta_bias"][:, None]
    if delta_softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))
    clock = delta.flip(-1).cumsum(-1).flip(-1) if reverse else delta.cumsum(-1)
    elapsed = clock[:, :, :, None] - clock[:, :, None, :]
    future = torch.ones(elapsed.shape[2:], dtype=torch.bool).triu(1)
    exponent = torch.einsum("dn,bdts->bdnts", A, elapsed).masked_fill(future.T if reverse else future, -torch.inf)
    y = torch.einsum("bnt,bdnts,bds,bns->bdt", C, exponent.exp(), delta * u, B)
    if "D" in inputs:
        y = y + inputs["D"][:, None] * u
    return y * F.silu(inputs["z"]) if "z" in inputs else y


def leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return {name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in inputs.items()}


def error(actual: Tensor, true: Tensor, scale: Tensor | None = None) -> float:
    largest = (true if scale is None else scale).abs().max().clamp(min=1e-30)
    return ((actual - true).abs().max() / largest).item()


def check(inputs: Inputs, backend: str, y_tolerance=2e-6, grad_tolerance=5e-6, **options: Any) -> None:
    """Compare y and the gradient of every input with the float64 truth on the same values."""
    true_inputs = leaves(inputs, torch.float64)
    true_y = expected(true_inputs, **options)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    y = selective_scan(**inputs, **options, backend=backend)
    assert y.shape == inputs["u"].shape
    assert y.dtype == inputs["u"].dtype
    assert error(y, true_y) < y_tolerance

    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    true_grads = dict(zip(inputs, torch.autograd.grad(true_y, list(true_inputs.values()), dy.double()), strict=True))
    for name, grad in zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True):
        assert grad.dtype == inputs[name].dtype
        # delta_bias's gradient is the sum of delta's, whose terms may cancel.
        grad_error = error(grad, true_grads[name], true_grads["delta" if name == "delta_bias" else name])
        assert grad_error < grad_tolerance, f"gradient of {name}: {grad_error:.1e}"


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@EVERY_BACKEND
@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 63, 197])
@pytest.mark.parametrize(("channels", "states"), list(itertools.product([1, 3, 17, 40], [1, 5, 16])))
def test_sizes(backend, channels, states, length):
    inputs = make_inputs(channels=channels, length=length, states=states)
    check(inputs, backend, delta_softplus=True, reverse=length % 2 == 0)


@EVERY_BACKEND
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("delta_softplus", [False, True])
@pytest.mark.parametrize("without", [names for n in range(4) for names in itertools.combinations(OPTIONAL, n)])
def test_options(backend, without, delta_softplus, reverse):
    inputs = make_inputs(length=13, without=without)
    if not delta_softplus:
        inputs["delta"] = inputs["delta"].abs()
        inputs.pop("delta_bias", None)
    check(inputs, backend, delta_softplus=delta_softplus, reverse=reverse)


@EVERY_BACKEND
@pytest.mark.parametrize("reverse", [False, True])
def test_many_blocks_of_the_batch(backend, reverse, monkeypatch):
    monkeypatch.setattr("timm_mamba_pkd.ops.parallel.BLOCK_PER_CPU_THREAD", 300)
    check(make_inputs(batch=7), backend, delta_softplus=True, reverse=reverse)


@EVERY_BACKEND
@pytest.mark.parametrize("reverse", [False, True])
def test_strided_views(backend, reverse):
    channels_last = {
        name: tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() == 3 else tensor
        for name, tensor in make_inputs().items()
    }
    check(channels_last, backend, delta_softplus=True, reverse=reverse)
    every_other = {name: tensor.repeat_interleave(2, -1)[..., ::2] for name, tensor in make_inputs().items()}
    check(every_other, backend, delta_softplus=True, reverse=reverse)
    expanded = make_inputs()
    expanded["B"] = expanded["B"][:1].expand(2, -1, -1)
    expanded["z"] = expanded["z"][:, :, :1].expand(-1, -1, 9)
    check(expanded, backend, delta_softplus=True, reverse=reverse)


@EVERY_BACKEND
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [(1e-6, 1e-6), (20.0, 20.0), (1e-6, 20.0)])
def test_extreme_steps(backend, steps, reverse):
    inputs = make_inputs(length=63, states=16, without=("delta_bias",))
    low, high = (torch.tensor(step).log() for step in steps)
    inputs["delta"] = (
        torch.linspace(low, high, 63)[torch.randperm(63, generator=torch.Generator().manual_seed(0))]
        .exp()
        .expand(2, 3, 63)
        .contiguous()
    )
    check(inputs, backend, reverse=reverse)


@EVERY_BACKEND
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(backend, reverse):
    inputs = leaves(make_inputs(channels=2, length=9, states=2, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda *tensors: selective_scan(*tensors, True, reverse, backend),  # pyright: ignore[reportCallIssue]
        tuple(inputs.values()),
    )


@EVERY_BACKEND
def test_reverse_is_flip(backend):
    inputs = make_inputs(length=11)
    flipped = {name: tensor.flip(-1) if tensor.dim() == 3 else tensor for name, tensor in inputs.items()}
    y = selective_scan(**inputs, delta_softplus=True, reverse=True, backend=backend)
    y_flipped = selective_scan(**flipped, delta_softplus=True, backend=backend)
    torch.testing.assert_close(y, y_flipped.flip(-1), rtol=1e-6, atol=1e-6)


@EVERY_BACKEND
def test_float64(backend):
    inputs = make_inputs(length=63, dtype=torch.float64)
    check(inputs, backend, 1e-12, 1e-12, delta_softplus=True)
    inputs = make_inputs()
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    inputs["A"] = inputs["A"].double()
    y_double_A = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert y_double_A.dtype == torch.float32
    assert error(y_double_A, y) < 2e-6


@EVERY_BACKEND
def test_bfloat16_mixed_with_float32(backend):
    inputs = make_inputs(length=63)
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name] = inputs[name].bfloat16()
    rounding = 2**-8
    check(inputs, backend, rounding, rounding, delta_softplus=True)


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [{"batch": 0}, {"length": 0}, {"channels": 0}])
def test_empty(backend, shape):
    inputs = leaves(make_inputs(**shape))
    y = selective_scan(**inputs, backend=backend)
    assert y.shape == inputs["u"].shape
    y.sum().backward()
    assert all(tensor.grad is None or not tensor.grad.any() for tensor in inputs.values())


@EVERY_BACKEND
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("u", torch.ones(3, 9), r"u must be \(batch, channels, length\), got shape \[3, 9\]"),
        ("u", torch.ones(2, 3, 9, dtype=torch.int64), "u must be a real floating tensor, got torch.int64"),
        ("delta", torch.ones(1, 3, 9), r"delta must be .* = \[2, 3, 9\], got shape \[1, 3, 9\]"),
        ("A", torch.ones(4, 5), r"A must be \(channels, states\) = \(3, at least 1\), got shape \[4, 5\]"),
        ("A", torch.ones(3, 0), r"A must be \(channels, states\) = \(3, at least 1\), got shape \[3, 0\]"),
        ("A", torch.ones(3, 5, dtype=torch.complex64), "A must be a real floating tensor, got torch.complex64"),
        ("B", torch.ones(2, 9, 5), r"B must be \(batch, states, length\) = \[2, 5, 9\], got shape \[2, 9, 5\]"),
        ("C", torch.ones(2, 1, 5, 9), r"C must be .* = \[2, 5, 9\], got shape \[2, 1, 5, 9\]"),
        ("D", torch.ones(1), r"D must be \(channels,\) = \[3\], got shape \[1\]"),
        ("z", torch.ones(2, 9, 3), r"z must be .* = \[2, 3, 9\], got shape \[2, 9, 3\]"),
        ("delta_bias", torch.ones(3, 1), r"delta_bias must be \(channels,\) = \[3\], got shape \[3, 1\]"),
    ],
)
def test_bad_tensors(backend, device, name, bad, message):
    inputs = {key: tensor.to(device) for key, tensor in {**make_inputs(), name: bad}.items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs, backend=backend)


@EVERY_BACKEND
def test_mixed_devices(backend):
    inputs = make_inputs()
    inputs["D"] = inputs["D"].to("meta")
    with pytest.raises(ValueError, match="D must be on cpu as the input is, got meta"):
        selective_scan(**inputs, backend=backend)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_unknown_backend(device):
    inputs = {name: tensor.to(device) for name, tensor in make_inputs().items()}
    choice = r"\['auto', 'native', 'mamba-ssm', 'parallel', 'triton', 'reference', 'exportable'\]"
    with pytest.raises(ValueError, match=f"unknown backend 'cuda'; choose one of {choice}"):
        selective_scan(**inputs, backend="cuda")


@pytest.mark.parametrize("backend", ["auto", *BACKENDS], indirect=True)
@pytest.mark.parametrize("without", [(), OPTIONAL])
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, without, save, dtype):
    inputs = leaves(make_inputs(without=without), dtype)
    inputs["u"] = inputs["u"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    arguments = (*(inputs.get(name) for name in NAMES), True, True, save, backend)
    torch.library.opcheck(torch.ops.timm_mamba_pkd.selective_scan.default, arguments)
    detached = (*(inputs[name].detach() if name in inputs else None for name in NAMES), True, True, backend)
    dy = torch.randn(inputs["u"].shape).to(dtype)
    saved = torch.ops.timm_mamba_pkd.selective_scan(*arguments)[1].detach()
    torch.library.opcheck(torch.ops.timm_mamba_pkd.selective_scan_backward.default, (dy, saved, *detached))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS], indirect=True)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops(backend, device):
    batch, channels, length, states = 2, 3, 9, 5
    inputs = {name: tensor.to(device).requires_grad_() for name, tensor in make_inputs().items()}
    forward = 9 * batch * length * channels * states + 2 * batch * length * channels
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(**inputs, backend=backend)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward
