"""The selective scan on this CPU: every backend, other implementations, and the floor, in one run.

    python benchmarks/scan.py --selective-scan-ref mamba_ssm/ops/selective_scan_interface.py

Float32, softplus, bias and skip, no gate; channels-last for ours, contiguous for the others. Medians in milliseconds
of forward and of forward + backward, peak memory of the latter in MB, and how many times as fast as the others native
is. mamba-ssm's ``selective_scan_ref`` is read from its source file, because the package cannot be imported without
CUDA; mambapy's parallel scan runs where mambapy is installed.

The floor is what the multiplications cost if nothing else did: 9 a state and step in the forward (6 of them for the
exponential) and 16 in the backward, which computes the states again, at the rate of this machine's matrix product, the
faster of MKL's and oneDNN's.
"""

import argparse
import ast
import ctypes
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_mamba_pkd.ops import BACKENDS, native, selective_scan

SHAPES = ((128, 128, 49, 16), (128, 256, 64, 16), (64, 384, 196, 16), (128, 64, 64, 8))
Scan = Callable[..., Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, nargs=4, action="append", metavar=("B", "D", "L", "N"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--selective-scan-ref", type=Path, help="mamba_ssm/ops/selective_scan_interface.py")
    parser.add_argument("--compile", action="store_true", help="the sequential loop under torch.compile, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    sides: dict[str, Scan] = {
        name: lambda *tensors, name=name: selective_scan(*tensors, delta_softplus=True, backend=name)
        for name, backend in BACKENDS.items()
        if backend.unavailable(torch.device("cpu")) is None
    }
    if args.selective_scan_ref:
        reference = function_of(args.selective_scan_ref, "selective_scan_ref")
        sides["mamba-ssm selective_scan_ref"] = lambda u, delta, A, B, C, D, z, bias: reference(
            u, delta, A, B, C, D, z, bias, delta_softplus=True
        )
    if importlib.util.find_spec("mambapy"):
        sides["mambapy pscan"] = mambapy
    if args.compile:
        loop = torch.compile(selective_scan, dynamic=False)
        sides["compiled loop"] = lambda *tensors: loop(*tensors, delta_softplus=True, backend="reference")

    kernels = native.INSTRUCTION_SETS[native.instruction_set()] if "native" in sides else "no native library"
    print(f"{args.threads} threads, {kernels}, torch {torch.__version__}")
    rate = products_per_second()
    print(f"matrix product: {rate / 1e9:.0f} G multiplications/s\n")
    for shape in args.shapes or SHAPES:
        batch, channels, length, states = shape
        keep_freed_memory(4 * batch * channels * length * states < 2**28)
        print(f"(B, D, L, N) = {tuple(shape)}")
        times = {name: measure(scan, shape, args.repeat, name in BACKENDS) for name, scan in sides.items()}
        steps = batch * channels * length * states
        floor = [1e3 * steps * n / rate for n in (9, 9 + 16)]
        base = times.get("native")
        for name, (forward, both, memory) in times.items():
            ratio = f"  {forward / base[0]:6.1f} x {both / base[1]:6.1f} x" if base else ""
            print(f"  {name:30}{forward:9.2f} ms {both:9.2f} ms {memory:7.0f} MB{ratio}", flush=True)
        ratio = f"  {floor[0] / base[0]:6.2f} x {floor[1] / base[1]:6.2f} x" if base else ""
        print(f"  {'floor':30}{floor[0]:9.2f} ms {floor[1]:9.2f} ms {'':10}{ratio}\n")


def keep_freed_memory(keep: bool) -> None:
    """Let what is freed stay with the process, so that no side pays for fresh pages.

    Not where tensors (B, D, L, N) of hundreds of MB would leave the heap in pieces until memory runs out: there the
    others pay for them, as in any program.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, -1)
    libc.mallopt(-4, 0 if keep else 2**16)
    libc.mallopt(-3, 2**25)


def measure(scan: Scan, shape: tuple[int, ...], repeat: int, channels_last: bool) -> tuple[float, float, float]:
    """Median milliseconds of forward and of forward + backward, and MB that the latter needs beyond its inputs."""
    ctypes.CDLL(None).malloc_trim(0)  # another side's memory lies in pieces of other sizes
    tensors = inputs(*shape, channels_last=channels_last)
    leaves = [None if x is None else x.requires_grad_() for x in tensors]
    assert tensors[0] is not None
    dy = torch.randn_like(tensors[0])

    def forward() -> None:
        with torch.no_grad():
            scan(*tensors)

    def both() -> None:
        torch.autograd.grad(scan(*leaves), [x for x in leaves if x is not None], dy)

    return median(forward, repeat), median(both, repeat), peak(both)


def inputs(batch: int, channels: int, length: int, states: int, channels_last: bool) -> list[Tensor | None]:
    torch.manual_seed(0)

    def normal(features: int) -> Tensor:
        x = torch.randn(batch, length, features).transpose(1, 2)
        return (x if channels_last else x.contiguous()).detach()

    u, delta, B, C = normal(channels), normal(channels) - 2, normal(states), normal(states)
    A = -torch.arange(1, states + 1).float().repeat(channels, 1)
    return [u, delta, A, B, C, torch.randn(channels), None, torch.randn(channels)]


def mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: None, bias: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    delta = F.softplus(delta + bias[:, None]).transpose(1, 2)
    x, B, C = (tensor.transpose(1, 2) for tensor in (u, B, C))
    decay = torch.exp(delta.unsqueeze(-1) * A)
    h = pscan(decay, (delta * x).unsqueeze(-1) * B.unsqueeze(2))
    return ((h @ C.unsqueeze(-1)).squeeze(3) + D * x).transpose(1, 2)


def function_of(path: Path, name: str) -> Scan:
    """A function of a module that cannot be imported."""
    from einops import rearrange, repeat  # pyright: ignore[reportMissingImports]

    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    namespace: dict[str, Any] = {"torch": torch, "F": F, "rearrange": rearrange, "repeat": repeat}
    exec(compile(tree, str(path), "exec"), namespace)
    return namespace[name]


def median(function: Callable[[], object], repeat: int) -> float:
    function()
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < repeat and sum(seconds) < 20):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def peak(function: Callable[[], object]) -> float:
    """The most that PyTorch's tensors take during a call, in MB."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    total = most = 0
    recorded: Any = profiler.profiler
    for event in sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most / 1e6


def products_per_second() -> float:
    """The most of PyTorch's two matrix products on CPUs: MKL's and, as a 1x1 convolution, oneDNN's."""
    a, b, size = torch.randn(2048, 2048), torch.randn(2048, 2048), 2048**3
    rows, weight = a.T.reshape(1, 2048, 2048, 1), b[:, :, None, None]
    products = (lambda: torch.mm(a, b), lambda: F.conv2d(rows, weight))
    return max(size / (1e-3 * median(product, 9)) for product in products)


if __name__ == "__main__":
    main()
