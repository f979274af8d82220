"""The Triton scan: on a GPU where there is one, else under Triton's interpreter, in a process of its own.

The interpreter is slow: a step of a program takes about 10 ms. It runs few cases, all small.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from timm_mamba_pkd.ops import BACKENDS, selective_scan, triton_scan
from timm_mamba_pkd.ops.reference import selective_scan_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
needs_device = pytest.mark.skipif(
    triton_scan.unavailable(DEVICE) is not None, reason=str(triton_scan.unavailable(DEVICE))
)
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
# Of the contract of all backends, what differs from case to case in the kernels.
CONTRACT = "triton and (test_options or test_strided or test_extreme and False or test_empty)"


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_under_the_interpreter():
    """Triton reads TRITON_INTERPRET when it is imported, which may have happened in this process."""
    pytest.importorskip("triton")
    files = [__file__, str(Path(__file__).with_name("test_selective_scan.py"))]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", f"test_triton_scan or {CONTRACT}", *files],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled here")
@pytest.mark.parametrize("minimal", [False, True])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_kernels_compile_for_a_gpu(name, minimal, monkeypatch, tmp_path):
    """The interpreter takes more than the compiler does; the compiler needs no GPU.

    Minimal: without what is optional and with sizes and strides of 1, which Triton makes constants.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(importlib.import_module("timm_mamba_pkd.ops.triton_kernels"), name)
    sequences, sizes = ("u", "delta", "B", "C", "z", "y", "dy", "du", "ddelta", "dz"), ("batch", "channels", "length")
    types: dict[str, Any] = dict.fromkeys(kernel.arg_names, "*fp32")
    types |= dict.fromkeys(sequences, ("*bf16", "i32", *(["constexpr"] * 2 if minimal else ["i32"] * 2)))
    types |= dict.fromkeys(("D", "delta_bias"), ("*fp32", "i32")) | dict.fromkeys(sizes, "i32")
    constants = {"SOFTPLUS": True, "REVERSE": True, "states": 5, "STATES": 8, "CHANNELS": 32, "CHUNK": 4}
    if minimal:
        constants |= dict.fromkeys(("D", "z", "delta_bias", "dD", "dz", "dbias")) | dict.fromkeys(sizes, 1)
        constants |= {"SOFTPLUS": False, "REVERSE": False, "saved": None} if name == "forward" else {}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    values: dict[tuple[int, ...], Any] = {}
    for index, (name, kind) in enumerate(signature.items()):
        if kind == "constexpr":
            values[(index,)] = constants[name]
        elif isinstance(kind, tuple):
            values |= {(index, place): 1 for place, part in enumerate(kind) if part == "constexpr"}
    source = ASTSource(kernel, signature, values)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=triton_scan._OPTIONS).asm["cubin"]


def make_inputs(batch: int, channels: int, length: int, states: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """u, delta, A, B, C, D, z, delta_bias; channels-last as the mixer's."""
    generator = torch.Generator().manual_seed(length)

    def sequence(features: int) -> Tensor:
        return torch.randn(batch, length, features, generator=generator).to(DEVICE, dtype).transpose(1, 2)

    u, delta, B, C, z = (sequence(features) for features in (channels, channels, states, states, channels))
    A = -torch.randn(channels, states, generator=generator).exp().to(DEVICE)
    D, bias = torch.randn(2, channels, generator=generator).to(DEVICE)
    return [u, delta, A, B, C, D, z, bias]


def check(tensors: list[Any], reverse: bool, y_tolerance: float = 2e-6, grad_tolerance: float = 5e-6) -> None:
    """Against the reference in float64 on the same values; errors relative to the largest true value."""
    true_tensors = [tensor.double().requires_grad_() for tensor in tensors]
    true_y = selective_scan_reference(*true_tensors, delta_softplus=True, reverse=reverse)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    y = selective_scan(*tensors, delta_softplus=True, reverse=reverse, backend="triton")
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, tensors, dy)
    true_grads = torch.autograd.grad(true_y, true_tensors, dy.double())
    scales = [true.abs().max() for true in (true_y, *true_grads)]
    scales[-1] = scales[2]  # delta_bias's gradient is the sum of delta's, whose terms may cancel
    tolerances = [y_tolerance] + [grad_tolerance] * len(grads)
    for actual, true, scale, tolerance in zip((y, *grads), (true_y, *true_grads), scales, tolerances, strict=True):
        assert (actual - true).abs().max() <= tolerance * scale


@needs_device
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("channels", "length", "states"),
    [(1, 1, 1), (1, 2, 5), (3, 9, 16), (17, 2, 1), (17, 9, 5), (40, 1, 5), (40, 9, 16)],
)
def test_sizes(channels, length, states, reverse):
    check(make_inputs(2, channels, length, states), reverse)


@needs_device
@pytest.mark.parametrize(("channels", "states", "reverse"), [(40, 16, False), (3, 5, True)])
def test_a_longer_sequence(channels, states, reverse):
    check(make_inputs(1, channels, 63, states), reverse)


@needs_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    rounding = torch.finfo(dtype).eps  # the interpreter truncates to bfloat16
    check(make_inputs(2, 17, 9, 5, dtype), False, rounding, rounding)


@needs_device
def test_backward_without_checkpoints():
    """The same bits as with them."""
    tensors = make_inputs(2, 40, 9, 5)
    y, saved = triton_scan.forward(*tensors, delta_softplus=True, reverse=True, save=True)
    assert list(saved.shape) == triton_scan.saved_shape(tensors[0], tensors[2]) == [2, 3, 40, 5]
    again, nothing = triton_scan.forward(*tensors, delta_softplus=True, reverse=True, save=False)
    assert torch.equal(y, again) and nothing.numel() == 0
    dy = torch.randn_like(y)
    grads, without = (
        triton_scan.backward(dy, kept, *tensors, delta_softplus=True, reverse=True) for kept in (saved, nothing)
    )
    for one, other in zip(grads, without, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@needs_device
def test_what_goes_to_the_parallel_backend():
    """Long sequences and float64."""
    parallel = BACKENDS["parallel"]
    for tensors in (make_inputs(1, 3, triton_scan.LONGEST + 1, 2), make_inputs(1, 3, 9, 2, torch.float64)):
        y, saved = BACKENDS["triton"].forward(*tensors, True, False, True)
        assert torch.equal(y, parallel.forward(*tensors, True, False, True)[0])
        grads = BACKENDS["triton"].backward(y, saved, *tensors, True, False)
        for one, other in zip(grads, parallel.backward(y, saved, *tensors, True, False), strict=True):
            assert one is not None and other is not None and torch.equal(one, other)


@needs_device
def test_negated_views():
    tensors = make_inputs(1, 3, 5, 2)
    negated = torch.complex(torch.zeros_like(tensors[0]), tensors[0]).conj().imag
    assert negated.is_neg()
    y = selective_scan(negated, *tensors[1:], backend="triton")
    assert torch.equal(y, selective_scan(-tensors[0], *tensors[1:], backend="triton"))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 384, 196, 16), (3, 129, 1024, 16), (70, 64, 49, 8), (2, 40, 31, 64)])
def test_sizes_of_models(shape, dtype):
    tolerances = (2e-6, 5e-6) if dtype == torch.float32 else (2**-8, 2**-8)
    check(make_inputs(*shape, dtype=dtype), False, *tolerances)
    check(make_inputs(*shape, dtype=dtype), True, *tolerances)


def test_why_it_cannot_serve(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "it runs on CUDA, not on cpu" in str(triton_scan.unavailable(torch.device("cpu")))
    assert triton_scan.unavailable(torch.device("cuda")) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton_scan.unavailable(torch.device("cuda")) == "Triton is not installed"
