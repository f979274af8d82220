"""Convolutional networks of the students' costs, made for 32x32 images, trained as the students are: one table.

    python -m benchmarks.accuracy.peers yaml_configs/cifar10/student_ce.yaml --seeds 42 --output runs/peers/ce
    python -m benchmarks.accuracy.peers yaml_configs/cifar10/progressive_residual.yaml --output runs/peers/distilled

Each network stands in the config where the students stood, alone; all else is the same. Finished runs are kept: the
command goes on where it was stopped. A config of one's own gets the peers from timm's registry, by `dependencies:
[{name: 'benchmarks.accuracy.peers'}]`, with `python -m timm_mamba_pkd train` in the root of the repository. Their
multiply-accumulates and parameters are those of the public zoo (chenyaofo/pytorch-cifar-models).
"""

import argparse
import re
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import timm
import torchvision
from timm.models import register_model
from torch import Tensor, nn

from benchmarks.accuracy.image_folder import reading_folders
from benchmarks.runs import train
from timm_mamba_pkd.layers import ConvNorm, InvertedResidual
from timm_mamba_pkd.report import read_csv


@register_model
def peer_shufflenet_v2_x0_5(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """torchvision's ShuffleNetV2 x0.5 (arXiv 1807.11164) with a stem of stride 1 and no max-pool: 10.9 MMACs."""
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=num_classes)
    model.conv1[0] = nn.Conv2d(in_chans, 24, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


@register_model
def peer_mobilenetv2_050(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """timm's MobileNetV2 x0.5 (arXiv 1801.04381) with stride 1 in the stem and in the second stage: 28 MMACs."""
    model: Any = timm.create_model("mobilenetv2_050", num_classes=num_classes, in_chans=in_chans)
    model.conv_stem.stride = (1, 1)
    model.blocks[1][0].conv_dw.stride = (1, 1)
    return model


@register_model
def peer_convolutions(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """The students' inverted residuals on every grid, after a stem on the image's own, at s4's budget: 10.9 MMACs."""
    return Convolutions(num_classes, in_chans)


class Convolutions(nn.Module):
    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.stem = ConvNorm(in_chans, 16, 3)
        self.blocks = nn.Sequential()
        for before, dim, depth in ((16, 32, 2), (32, 64, 3), (64, 128, 2)):
            self.blocks.append(InvertedResidual(before, dim, stride=2))
            self.blocks.extend(InvertedResidual(dim, dim) for _ in range(depth))
        self.head = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--models", nargs="+", default=["mamba_pkd_s4", "peer_convolutions", "peer_shufflenet_v2_x0_5"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--image-folder", type=Path, help="CIFAR-10 as image files, in train/ and test/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--flags", type=shlex.split, default=[], help="of mamba-pkd train: --flags=--channels-last")
    args = parser.parse_args()

    text = args.config.read_text()
    if args.image_folder:
        text = reading_folders(text, args.image_folder)
    table = ["| model | params (M) | MMACs | top-1 (%) |", "|---|---:|---:|---:|"]
    for name in args.models:
        rows = []
        for seed in args.seeds:
            folder = args.output / f"{name}_{seed}"
            train(with_model(text, name), folder, ["--seed", str(seed), *args.flags])
            rows.append(next(row for row in read_csv(folder / "results.csv") if row.role == "student"))
        top1 = [row.top1 for row in rows]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        cost = f"{rows[0].param_count:.3f} | {1000 * rows[0].gmacs:.1f}"
        table.append(f"| {name} | {cost} | {statistics.mean(top1):.2f}{spread} |")
        print("\n".join(table[-1:] if len(table) > 3 else table), flush=True)


def with_model(text: str, name: str) -> str:
    """The config with another network of timm's registry for its students."""
    text, found = re.subn(r"'mamba_pkd_s\d'(, 'mamba_pkd_s\d')*", f"'{name}'", text)
    if found != 1:
        sys.exit(f"the config must name one of s1 to s7, or one list of them, in quotes; this one has {found}")
    text = text.replace("{name: 'timm_mamba_pkd'}", "{name: 'timm_mamba_pkd'}, {name: 'benchmarks.accuracy.peers'}")
    return re.sub(r"dst_ckpt: .*", "dst_ckpt:", text)


if __name__ == "__main__":
    main()
