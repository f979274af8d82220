"""Everything of PyTorch that has to work with both operators, and with the PyTorch code that serves for them."""

import io
import itertools
import shutil

import pytest
import torch
from torch import Tensor, nn

from timm_mamba_pkd.ops import BACKENDS, causal_conv1d_silu, native, selective_scan

EVERY_BACKEND = ["reference", "exportable", *BACKENDS, *(f"native: {name}" for name in native.INSTRUCTION_SETS)]


class Scan(nn.Module):
    """A module around the scan, as a mixer calls it."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return selective_scan(u, delta, A, B, C, D, delta_softplus=True, backend=self.backend)

    @staticmethod
    def shapes(batch: int, length: int) -> list[tuple[int, ...]]:
        return [(batch, 3, length), (batch, 3, length), (3, 5), (batch, 5, length), (batch, 5, length), (3,)]


class Convolution(nn.Module):
    """The same around the convolution."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d_silu(x, weight, bias, backend=self.backend)

    @staticmethod
    def shapes(batch: int, length: int) -> list[tuple[int, ...]]:
        return [(batch, 3, length), (3, 4), (3,)]


def make_inputs(operator, batch: int = 2, length: int = 9) -> tuple[Tensor, ...]:
    """Negative, as the scan's A has to be."""
    generator = torch.Generator().manual_seed(length)
    shapes = operator.shapes(batch, length)
    return tuple((-torch.rand(shape, generator=generator)).requires_grad_() for shape in shapes)


def assert_same_function(transformed, original, batch: int = 2) -> None:
    inputs = make_inputs(original, batch)
    y, true_y = transformed(*inputs), original(*inputs)
    torch.testing.assert_close(y, true_y)
    grads, true_grads = (torch.autograd.grad(out.square().sum(), inputs) for out in (y, true_y))
    torch.testing.assert_close(grads, true_grads)


@pytest.fixture(params=itertools.product([Scan, Convolution], ["auto", "exportable", "reference"]))
def operator(request):
    module, backend = request.param
    return module(backend)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_script(operator):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(operator), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for batch in (2, 3, 1):
        assert_same_function(loaded, operator, batch)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(operator):
    traced = torch.jit.trace(operator, make_inputs(operator))
    assert_same_function(traced, operator)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_fx(operator):
    traced = torch.fx.symbolic_trace(operator)
    assert [node.op for node in traced.graph.nodes].count(
        "call_function"
    ) <= 2  # the operator, the first of its outputs
    assert_same_function(traced, operator, 3)
    assert_same_function(torch.jit.script(traced), operator, 3)


def test_compile(operator):
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        assert_same_function(compiled, operator, batch)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("module", [Scan, Convolution])
def test_compile_to_native_code(module):
    assert_same_function(torch.compile(module("auto"), fullgraph=True), module("auto"))


@pytest.mark.parametrize("strict", [False, True])
def test_export(operator, strict):
    inputs = make_inputs(operator)
    batch = torch.export.Dim("batch")
    dynamic = tuple({0: batch} if tensor.dim() == 3 else None for tensor in inputs)
    exported = torch.export.export(operator, inputs, dynamic_shapes=dynamic, strict=strict).module()
    for size in (1, 5):
        assert_same_function(exported, operator, size)


def operators_of(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("module", [Scan, Convolution])
def test_exportable_is_pytorchs_operators_alone(module):
    """Of which the scan takes a number that grows with the logarithm of the length."""
    counts = []
    for length in (64, 128, 256):
        scan = module("exportable")
        operators = operators_of(torch.export.export(scan, make_inputs(scan, length=length)))
        assert {name.split(".")[0] for name in operators} == {"aten"}
        counts.append(len(operators))
    assert counts[2] < 150
    assert counts[2] - counts[1] == counts[1] - counts[0]


@pytest.mark.parametrize("module", [Scan, Convolution])
@pytest.mark.parametrize("backend", EVERY_BACKEND, indirect=True)
def test_autocast_leaves_float32_alone(module, backend):
    operator = module(backend)
    inputs = make_inputs(operator, length=63)
    true_y = operator(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = operator(*inputs)
        grads = torch.autograd.grad(y.sum(), inputs)
    assert torch.equal(y, true_y)
    for grad, true_grad in zip(grads, torch.autograd.grad(true_y.sum(), inputs), strict=True):
        assert torch.equal(grad, true_grad)


def test_meta_device(operator):
    inputs = tuple(tensor.detach().to("meta").requires_grad_() for tensor in make_inputs(operator))
    y = operator(*inputs)
    assert (y.device.type, y.shape) == ("meta", inputs[0].shape)
    assert [grad.shape for grad in torch.autograd.grad(y.sum(), inputs)] == [tensor.shape for tensor in inputs]


def test_forward_mode(operator):
    """Against reverse mode, where there is one; elsewhere it is refused, and not zero."""
    inputs = make_inputs(operator)
    tangents = tuple(torch.rand_like(tensor) for tensor in inputs)
    if operator.backend == "auto":
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(operator, inputs, tangents)
        return
    y, tangent = torch.func.jvp(operator, inputs, tangents)[:2]
    weights = torch.rand_like(y)
    grads = torch.autograd.grad((operator(*inputs) * weights).sum(), inputs)
    expected = sum((grad * own).sum() for grad, own in zip(grads, tangents, strict=True))
    torch.testing.assert_close((tangent * weights).sum(), expected)
