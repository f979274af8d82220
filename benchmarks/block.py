"""Whole blocks and whole students on this CPU, next to timm's of equal cost, in one run.

    python benchmarks/block.py --peers mobilenetv4_conv_small_035 test_vit2

Blocks: a residual Mamba mixer (d_state 16, expand 2) on every backend of the scan and with mambapy's parallel scan, and
timm's ViT block with the MLP that gives it the same MACs; forward + backward, median milliseconds. Students: images per
second in training (forward + backward) and in inference, with one thread and with all, next to any models of timm.
"""

import argparse
import ctypes
import importlib.util
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import timm
import torch
from scan import mambapy, median
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from timm_mamba_pkd.layers import Mamba
from timm_mamba_pkd.models import count_macs
from timm_mamba_pkd.ops import BACKENDS
from timm_mamba_pkd.ops.backends import VARIABLE

SHAPES = ((128, 7, 64), (128, 8, 128), (64, 14, 192))


class Residual(nn.Module):
    """x + mixer(norm(x)) on (B, H, W, C)."""

    def __init__(self, dim: int, bidirectional: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mixer = Mamba(dim, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class ViT(nn.Module):
    """timm's ViT block on (B, H, W, C)."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.block = Block(dim, max(1, dim // 32), mlp_ratio=mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.flatten(1, 2)).view_as(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="*", default=[f"mamba_pkd_s{i}" for i in range(1, 8)])
    parser.add_argument("--peers", nargs="*", default=[], help="models of timm")
    parser.add_argument("--input-size", type=int, nargs=3, default=(3, 32, 32))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    # What is freed stays with the process, so that no side pays for fresh pages.
    ctypes.CDLL(None).mallopt(-1, -1)
    ctypes.CDLL(None).mallopt(-4, 0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    for shape in SHAPES:
        blocks(*shape, repeat=args.repeat)
    students(args)


def blocks(batch: int, grid: int, dim: int, repeat: int) -> None:
    print(f"block, batch {batch}, {grid}x{grid} tokens, dim {dim}")
    x = torch.randn(batch, grid, grid, dim)
    one, two = Residual(dim, bidirectional=False), Residual(dim, bidirectional=True)
    macs = macs_of(one, x)
    ratio = max(1 / dim, 1 + (macs - macs_of(ViT(dim, 1), x)) / (2 * x[0].numel() * dim))
    times = {}
    for name, backend in BACKENDS.items():
        if backend.unavailable(x.device) is None:
            with mock.patch.dict(os.environ, {VARIABLE: name}):
                times[f"Mamba, {name} scan"] = median(training(one, x), repeat)
                times[f"Mamba, both directions, {name} scan"] = median(training(two, x), repeat)
    if importlib.util.find_spec("mambapy"):
        with mock.patch("timm_mamba_pkd.layers.mamba.selective_scan", mambapy_scan):
            times["Mamba, mambapy's scan"] = median(training(one, x), repeat)
    vit = ViT(dim, ratio)
    times[f"ViT, {macs_of(vit, x) / macs:.2f} of its MACs (mlp_ratio {ratio:.2f})"] = median(training(vit, x), repeat)
    times["ViT, mlp_ratio 4"] = median(training(ViT(dim, 4), x), repeat)
    first = next(iter(times.values()))
    for name, milliseconds in times.items():
        print(f"  {name:46}{milliseconds:8.1f} ms {milliseconds / first:6.2f} x", flush=True)
    print()


def mambapy_scan(u: Tensor, *arguments: Any, **options: object) -> Tensor:
    return mambapy(u, *arguments)


def macs_of(block: nn.Module, x: Tensor) -> int:
    class Image(nn.Module):
        """The block on an image (1, C, H, W)."""

        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, image: Tensor) -> Tensor:
            return self.block(image.permute(0, 2, 3, 1))

    _, height, width, channels = x.shape
    return count_macs(Image(), (channels, height, width))


def students(args: argparse.Namespace) -> None:
    channels, height, width = args.input_size
    x = torch.randn(args.batch_size, channels, height, width).to(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    print(f"images per second, batch {args.batch_size}, {channels}x{height}x{width}, channels-last")
    columns = [f"{what}, {n} thread{'s' * (n > 1)}" for n in sorted({1, threads}) for what in ("training", "inference")]
    print(f"  {'model':34}{'MMACs':>8}" + "".join(f"{column:>22}" for column in columns))
    for name in [*args.students, *args.peers]:
        model = timm.create_model(name, num_classes=10, **kwargs_of(name, args.input_size))
        model = model.to(memory_format=torch.channels_last)
        line = f"  {name:34}{count_macs(model, tuple(args.input_size)) / 1e6:8.1f}"
        for number in sorted({1, threads}):
            torch.set_num_threads(number)
            for function in (training(model.train(), x), inference(model, x)):
                line += f"{1e3 * args.batch_size / median(function, args.repeat):22.0f}"
        print(line, flush=True)


def kwargs_of(name: str, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """``img_size`` only for those that have one."""
    kwargs: dict[str, Any] = {"in_chans": input_size[0]}
    try:
        timm.create_model(name, **kwargs, img_size=input_size[1])
    except TypeError:
        return kwargs
    return kwargs | {"img_size": input_size[1]}


def training(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def step() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return step


def inference(model: nn.Module, x: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def step() -> None:
        model.eval()(x)

    return step


if __name__ == "__main__":
    main()
