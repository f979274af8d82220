"""The selective scan on a GPU: the Triton backend, mamba-ssm and the parallel backend, beside the memory's floor.

    python benchmarks/scan_gpu.py

Softplus, bias, skip and gate. Medians in milliseconds, by CUDA events, of the forward (with what it saves for the
backward), of the backward, and of both directions: forward and backward of a scan and of one in reverse, as a
bidirectional mixer runs them. Ours are channels-last, mamba-ssm's contiguous and flipped for the reverse; it runs where
it is installed. In parentheses: how many times as long as Triton's.

The floor is the bytes of all inputs and outputs over the bandwidth of a large copy. Tensors that fit the GPU's cache
(the second shape's do, or nearly) can beat it.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from timm_mamba_pkd.ops import BACKENDS, selective_scan

SHAPES = ((1024, 384, 196, 16), (512, 128, 64, 16))
REPEAT = 30
Scan = Callable[..., Tensor]


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU, and PyTorch finds none")
    device = torch.device("cuda")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s\n")
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            print(f"(B, D, L, N) = {shape}, {dtype}")
            times = {}
            for name in ("triton", "parallel"):
                reason = BACKENDS[name].unavailable(device)
                if reason is None:
                    times[name] = measure(ours(name), inputs(*shape, dtype))
                else:
                    print(f"  {name}: {reason}")
            try:
                times["mamba-ssm"] = measure(theirs(), [tensor.contiguous() for tensor in inputs(*shape, dtype)])
            except Exception as error:  # without its compiled kernels its import or its call can fail in many ways
                print(f"  mamba-ssm: {error!r}")
            times["floor"] = [1e3 * moved / bandwidth for moved in bytes_moved(*shape, dtype)]
            print(f"  {'':10}{'forward':>20}{'backward':>20}{'both directions':>20}")
            for name, row in times.items():
                ratios = [f"({one / base:6.2f} x)" for one, base in zip(row, times.get("triton", row), strict=True)]
                cells = [f"{one:8.3f} {ratio}" for one, ratio in zip(row, ratios, strict=True)]
                print(f"  {name:10}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
            print()


def ours(backend: str) -> Scan:
    def scan(*tensors: Tensor, reverse: bool) -> Tensor:
        return selective_scan(*tensors, delta_softplus=True, reverse=reverse, backend=backend)

    return scan


def theirs() -> Scan:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]

    def scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, reverse: bool
    ):
        if reverse:
            u, delta, B, C, z = (tensor.flip(-1) for tensor in (u, delta, B, C, z))
        y = selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True)
        return y.flip(-1) if reverse else y

    return scan


def inputs(batch: int, channels: int, length: int, states: int, dtype: torch.dtype) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias, channels-last."""
    torch.manual_seed(0)

    def sequence(features: int) -> Tensor:
        return torch.randn(batch, length, features, device="cuda", dtype=dtype).transpose(1, 2)

    u, delta, B, C, z = (sequence(features) for features in (channels, channels, states, states, channels))
    A = -torch.arange(1, states + 1, device="cuda").float().repeat(channels, 1)
    D, bias = torch.randn(2, channels, device="cuda")
    return [u, delta, A, B, C, D, z, bias - 2]


def measure(scan: Scan, tensors: list[Tensor]) -> list[float]:
    """Milliseconds of forward, backward and both directions."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    dy = torch.randn_like(tensors[0])
    y = scan(*leaves, reverse=False)

    def both_directions() -> None:
        out = scan(*leaves, reverse=False) + scan(*leaves, reverse=True)
        torch.autograd.grad(out, leaves, dy)

    return [
        median(lambda: scan(*leaves, reverse=False)),
        median(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)),
        median(both_directions),
    ]


def median(function: Callable[[], Any]) -> float:
    for _ in range(3):
        function()
    milliseconds = []
    for _ in range(REPEAT):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        milliseconds.append(start.elapsed_time(end))
    return statistics.median(milliseconds)


def bytes_moved(batch: int, channels: int, length: int, states: int, dtype: torch.dtype) -> list[int]:
    """Of forward, backward and both directions, if every tensor is read or written once."""
    activation, parameter = batch * length * channels * dtype.itemsize, batch * length * states * dtype.itemsize
    forward = 4 * activation + 2 * parameter  # u, delta, z, y; B, C
    backward = 7 * activation + 4 * parameter  # u, delta, z, dy and gradients of the first three; B, C and theirs
    return [forward, backward, 2 * (forward + backward)]


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 2 GB."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * median(lambda: target.copy_(source)))


if __name__ == "__main__":
    main()
