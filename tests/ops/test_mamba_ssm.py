"""The adapter to mamba-ssm beyond the contract: broken installations, and what the kernels cannot take.

Without a GPU the kernels are fakes on the CPU that refuse what the real ones would refuse or misread.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_mamba_pkd.ops import causal_conv1d_silu, mamba_ssm, parallel, selective_scan

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@pytest.fixture
def install(monkeypatch):
    """Put modules with these functions in the place of mamba-ssm and causal-conv1d, and serve on the CPU."""

    def install(scan: Any, convolution: Any, **attributes: Any) -> None:
        package, ops, interface, convolutions = map(ModuleType, ("mamba_ssm", "ops", "interface", "causal_conv1d"))
        interface.__dict__.update(selective_scan_fn=scan, selective_scan_cuda=object(), **attributes)
        convolutions.__dict__.update(causal_conv1d_fn=convolution)
        monkeypatch.setitem(sys.modules, "mamba_ssm", package)
        monkeypatch.setitem(sys.modules, "mamba_ssm.ops", ops)
        monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
        monkeypatch.setitem(sys.modules, "causal_conv1d", convolutions)

    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(mamba_ssm, "DEVICE", "cpu")
    mamba_ssm._load.cache_clear()
    yield install
    mamba_ssm._load.cache_clear()


class Scale(torch.autograd.Function):
    """The identity, with a gradient scaled by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy[0] * ctx.factor, None


def make_inputs(channels=8, length=9, states=5, device=CPU) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias; channels-last as the mixer's."""
    generator = torch.Generator().manual_seed(length)
    sizes = (channels, channels, states, states, channels)
    u, delta, B, C, z = (torch.randn(2, length, size, generator=generator).transpose(1, 2) for size in sizes)
    A, D, delta_bias = torch.randn(3, channels, states, generator=generator)
    return [x.to(device) for x in (u, delta, -A.abs(), B, C, D[:, 0], z, delta_bias[:, 0])]


def differentiate(function: Any, inputs: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    """y and all gradients, of which all but the reference promise the layout of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves, **options, backend=backend)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    results = [y, *torch.autograd.grad(y, leaves, dy)]
    if backend != "reference":
        layouts = [torch.empty_like(x).stride() for x in (inputs[0], *inputs)]
        assert [x.stride() for x in results] == layouts
    return results


def assert_same(actual: list[Tensor], true: list[Tensor], tolerance: float = 5e-6) -> None:
    for one, other in zip(actual, true, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())


def test_right_kernels_serve(install, fake_kernels, caplog):
    install(*fake_kernels)
    assert mamba_ssm.unavailable(CPU) is None
    assert mamba_ssm._load() == fake_kernels
    assert not caplog.records


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"), FakeTensorMode()],
    ids=lambda mode: type(mode).__name__,
)
def test_modes_of_the_caller_do_not_reach_the_probe(install, fake_kernels, mode):
    install(*fake_kernels)
    with mode:
        assert mamba_ssm.unavailable(CPU) is None
    assert mamba_ssm._load() == fake_kernels


@pytest.mark.parametrize("position", range(8), ids=NAMES)
@pytest.mark.parametrize("factor", [0.9, float("nan")])
def test_one_wrong_gradient(install, fake_kernels, position, factor):
    def scan(*tensors: Any, **options: Any) -> Tensor:
        arguments = list(tensors)
        if arguments[position] is not None:
            arguments[position] = Scale.apply(arguments[position], factor)
        return fake_kernels.scan(*arguments, **options)

    install(scan, fake_kernels.convolution)
    reason = f"mamba-ssm failed its test on cpu.*: the gradient of {NAMES[position]} differs from the reference by"
    with pytest.raises(ValueError, match=f"'mamba-ssm' cannot serve: {reason}"):
        differentiate(selective_scan, make_inputs(), "mamba-ssm")


@pytest.mark.parametrize("factor", [1.01, float("nan"), float("inf")])
def test_a_wrong_result(install, fake_kernels, factor):
    install(lambda *tensors, **options: factor * fake_kernels.scan(*tensors, **options), fake_kernels.convolution)
    assert "ArithmeticError: y differs from the reference by" in str(mamba_ssm.unavailable(CPU))


def test_wrong_in_bfloat16_only(install, fake_kernels):
    def scan(u: Tensor, *tensors: Any, **options: Any) -> Tensor:
        y = fake_kernels.scan(u, *tensors, **options)
        return y if u.dtype == torch.float32 else 1.1 * y

    install(scan, fake_kernels.convolution)
    assert "ArithmeticError: y differs" in str(mamba_ssm.unavailable(CPU))


@pytest.mark.parametrize("error", [RuntimeError, TypeError, SystemExit])
def test_kernels_that_raise(install, fake_kernels, error):
    def scan(*tensors: Any, **options: Any) -> Tensor:
        raise error("no kernel image is available\nfor this device")

    install(scan, fake_kernels.convolution)
    reason = str(mamba_ssm.unavailable(CPU))
    assert reason.startswith("mamba-ssm failed its test on cpu")
    assert reason.endswith(f": {error.__name__}: no kernel image is available")


def test_a_result_without_gradient(install, fake_kernels):
    install(lambda *tensors, **options: fake_kernels.scan(*tensors, **options).detach(), fake_kernels.convolution)
    assert "RuntimeError: element 0 of tensors does not require grad" in str(mamba_ssm.unavailable(CPU))


def test_without_its_extension(install, fake_kernels):
    install(*fake_kernels)
    sys.modules["mamba_ssm.ops.selective_scan_interface"].__dict__.update(selective_scan_cuda=None)
    assert mamba_ssm.unavailable(CPU) == "mamba-ssm was installed without its CUDA extension selective_scan_cuda"


def test_without_its_function(install, fake_kernels):
    install(*fake_kernels)
    del sys.modules["mamba_ssm.ops.selective_scan_interface"].__dict__["selective_scan_fn"]
    assert "mamba-ssm cannot be imported: AttributeError: " in str(mamba_ssm.unavailable(CPU))


def test_not_installed(install, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [])
    assert mamba_ssm.unavailable(CPU) == "mamba-ssm is not installed: pip install 'timm_mamba_pkd[cuda]'"


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("import selective_scan_no_cuda", "ModuleNotFoundError: No module named 'selective_scan_no_cuda'"),
        ("raise ImportError('libcudart.so.11.0')", "ImportError: libcudart.so.11.0"),
        ("raise AttributeError('no attribute')", "AttributeError: no attribute"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first"),
        ("raise SystemExit(1)", "SystemExit: 1"),
    ],
)
def test_imports_that_raise(install, monkeypatch, tmp_path, statement, reason):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text(statement)
    monkeypatch.syspath_prepend(tmp_path)
    assert mamba_ssm.unavailable(CPU) == f"mamba-ssm cannot be imported: {reason}"


def test_it_is_not_imported_for_a_cpu(tmp_path):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("raise SystemExit('imported')")
    code = """
import torch, timm_mamba_pkd
from timm_mamba_pkd.ops import mamba_ssm
timm_mamba_pkd.selective_scan(*torch.rand(5, 4, 4, 4)[:2], torch.rand(4, 4), *torch.rand(2, 4, 4, 4))
print(mamba_ssm.unavailable(torch.device("cpu")))
print(mamba_ssm.unavailable(torch.device("cuda")))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [
        "it runs on CUDA devices, not on cpu",
        "mamba-ssm cannot be imported: SystemExit: imported",
    ]


@pytest.mark.parametrize("fault", ["missing", "wrong", "wrong gradient", "raises"])
def test_without_causal_conv1d_pytorch_convolves(install, fake_kernels, monkeypatch, caplog, fault):
    def convolution(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        if fault == "wrong gradient":
            return fake_kernels.convolution(x, Scale.apply(weight, 0.9), *rest, **options)
        return 1.1 * fake_kernels.convolution(x, weight, *rest, **options)

    install(fake_kernels.scan, convolution)
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    inputs = [torch.randn(2, 8, 9), torch.randn(8, 4), torch.randn(8)]
    actual = differentiate(causal_conv1d_silu, inputs, "mamba-ssm")
    assert_same(actual, differentiate(causal_conv1d_silu, inputs, "parallel"), 0)
    reason = {
        "missing": "ModuleNotFoundError: ",
        "wrong": "ArithmeticError: y differs from the reference by ",
        "wrong gradient": "ArithmeticError: the gradient of weight differs from the reference by ",
        "raises": "RuntimeError: no kernel image is available",
    }[fault]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith(f"causal-conv1d cannot serve, PyTorch's convolution does: {reason}")


@pytest.mark.parametrize("backend", ["mamba-ssm"], indirect=True)
def test_what_the_kernels_cannot_take_is_computed_by_pytorch(backend, monkeypatch):
    names = ("forward", "backward", "convolve", "convolve_backward")
    spies = [Mock(wraps=getattr(parallel, name)) for name in names]
    for name, spy in zip(names, spies, strict=True):
        monkeypatch.setattr(parallel, name, spy)

    differentiate(selective_scan, make_inputs(states=256), backend)
    x = torch.randn(2, 8, 9)
    for width in (2, 3, 4):
        differentiate(causal_conv1d_silu, [x, torch.randn(8, width)], backend)
    assert [spy.call_count for spy in spies] == [0, 0, 0, 0]

    many = make_inputs(channels=2, states=257)
    actual = differentiate(selective_scan, many, backend, reverse=True)
    assert_same(actual, differentiate(selective_scan, many, "reference", reverse=True))
    u, delta, A, *rest = make_inputs()
    differentiate(selective_scan, [u, delta, A.double(), *rest], backend)
    for weight in (torch.randn(8, 1), torch.randn(8, 5), torch.randn(8, 4).double()):
        differentiate(causal_conv1d_silu, [x, weight], backend)
    assert [spy.call_count for spy in spies] == [2, 2, 3, 3]
    huge = torch.empty(1, device="meta").expand(2**12, 2**10, 2**9)
    assert not mamba_ssm._can_index(huge, 1) and mamba_ssm._can_index(huge[1:], 1)


@pytest.mark.parametrize("backend", ["mamba-ssm"], indirect=True)
@pytest.mark.parametrize("reverse", [False, True])
def test_mixed_dtypes(backend, reverse):
    """Sequences of one dtype stay in it; of several, they are computed in float32. Parameters always are."""
    inputs = make_inputs()
    half, brain, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for dtypes in [(half,) * 5, (half, brain, single, half, half), (single, brain, single, single, double)]:
        for position, dtype in zip((0, 1, 3, 4, 6), dtypes, strict=True):
            inputs[position] = inputs[position].to(dtype)
        for parameters in (half, brain, double):
            inputs[5], inputs[7] = inputs[5].to(parameters), inputs[7].to(parameters)
            actual = differentiate(selective_scan, inputs, backend, delta_softplus=True, reverse=reverse)
            true = differentiate(selective_scan, inputs, "parallel", delta_softplus=True, reverse=reverse)
            for one, other in zip(actual, true, strict=True):
                assert_same([one], [other], 5e-6 if one.dtype in (single, double) else 2**-7)


@pytest.mark.parametrize("backend", ["mamba-ssm"], indirect=True)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 8])
def test_misaligned_and_negated(backend, length, reverse):
    def shift(x: Tensor) -> Tensor:
        return torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)

    def negate(x: Tensor) -> Tensor:
        return torch._neg_view(-x)

    inputs = [x.contiguous() for x in make_inputs(length=length)]
    convolution = [inputs[0], torch.randn(8, 4), torch.randn(8)]
    for change in (shift, negate):
        for function, tensors in ((selective_scan, inputs), (causal_conv1d_silu, convolution)):
            changed = [change(x) for x in tensors]
            actual = differentiate(function, changed, backend, reverse=reverse)
            assert_same(actual, differentiate(function, changed, "parallel", reverse=reverse))


@pytest.mark.parametrize("backend", ["mamba-ssm"], indirect=True)
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 8])
def test_layouts_of_the_convolution(backend, channels, length):
    rows = torch.randn(2, channels, length)
    weight, bias = torch.randn(channels, 4), torch.randn(channels, 2)[:, 0]
    wide = torch.randn(2, length, 2 * channels).transpose(1, 2)
    for x in (rows, rows.transpose(1, 2).contiguous().transpose(1, 2), *wide.chunk(2, dim=1)):
        actual = differentiate(causal_conv1d_silu, [x, weight, bias], backend)
        assert_same(actual, differentiate(causal_conv1d_silu, [x, weight, bias], "parallel"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("channels", "length", "states"), [(1, 1, 1), (3, 9, 5), (40, 64, 16), (64, 197, 16), (8, 2100, 4), (3, 9, 257)]
)
def test_on_cuda(channels, length, states, reverse, dtype):
    if reason := mamba_ssm.unavailable(CUDA):
        pytest.skip(reason)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    inputs = make_inputs(channels, length, states, CUDA)
    inputs = [x.to(dtype) if x.dim() == 3 else x for x in inputs]
    options = {"delta_softplus": True, "reverse": reverse}
    actual = differentiate(selective_scan, inputs, "mamba-ssm", **options)
    assert_same(actual, differentiate(selective_scan, inputs, "reference", **options), tolerance)
    for width in (2, 4, 5):
        inputs = [inputs[0], torch.randn(channels, width, device=CUDA), torch.randn(channels, device=CUDA)]
        actual = differentiate(causal_conv1d_silu, inputs, "mamba-ssm", reverse=reverse)
        true = differentiate(causal_conv1d_silu, inputs, "parallel", reverse=reverse)
        assert_same(actual, true, tolerance)
