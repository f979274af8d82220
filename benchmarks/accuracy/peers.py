"""Convolutional networks of the students' costs, made for 32x32 images, trained as the students are: one table.

    python -m benchmarks.accuracy.peers yaml_configs/cifar10/student_ce.yaml --seeds 42 --output runs/peers

Each network stands in the config where the student stood; all else is the same. Finished runs are kept: the command
goes on where it was stopped. A config of one's own gets the peers from torchdistill's registry, by `dependencies:
[{name: 'benchmarks.accuracy.peers'}]`, with `python -m timm_mamba_pkd train` in the root of the repository. Their
multiply-accumulates and parameters are those of the public zoo (chenyaofo/pytorch-cifar-models).
"""

import argparse
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import timm
import torchvision
from torch import Tensor, nn
from torchdistill.models.registry import register_model

from benchmarks.accuracy.image_folder import reading_folders
from benchmarks.runs import train
from timm_mamba_pkd.layers import ConvNorm, InvertedResidual
from timm_mamba_pkd.report import read_csv


@register_model(key="peer_shufflenet_v2_x0_5")
def shufflenet_v2_x0_5(num_classes: int) -> nn.Module:
    """torchvision's ShuffleNetV2 x0.5 (arXiv 1807.11164) with a stem of stride 1 and no max-pool: 10.9 MMACs."""
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=num_classes)
    model.conv1[0].stride = (1, 1)  # pyright: ignore[reportArgumentType]
    model.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


@register_model(key="peer_mobilenetv2_050")
def mobilenetv2_050(num_classes: int) -> nn.Module:
    """timm's MobileNetV2 x0.5 (arXiv 1801.04381) with stride 1 in the stem and in the second stage: 28 MMACs."""
    model: Any = timm.create_model("mobilenetv2_050", num_classes=num_classes)
    model.conv_stem.stride = (1, 1)
    model.blocks[1][0].conv_dw.stride = (1, 1)
    return model


@register_model(key="peer_convolutions")
class Convolutions(nn.Module):
    """The students' inverted residuals on every grid, after a stem on the image's own, at s4's budget: 10.9 MMACs."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 16, 3)
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
            rows.append(read_csv(folder / "results.csv")[0])
        top1 = [row.top1 for row in rows]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        cost = f"{rows[0].param_count:.3f} | {1000 * rows[0].gmacs:.1f}"
        table.append(f"| {name} | {cost} | {statistics.mean(top1):.2f}{spread} |")
        print("\n".join(table[-1:] if len(table) > 3 else table), flush=True)


def with_model(text: str, name: str) -> str:
    """The config with another network: one of timm's, or one of torchdistill's registry."""
    model = f"key: 'mamba_pkd_timm_model'\n    kwargs:\n      model_name: '{name}'"
    if not timm.is_model(name):
        model = f"key: '{name}'\n    kwargs:"
        text = text.replace("{name: 'timm_mamba_pkd'}", "{name: 'timm_mamba_pkd'}, {name: 'benchmarks.accuracy.peers'}")
    text, found = re.subn(r"key: 'mamba_pkd_timm_model'\n    kwargs:\n      model_name: .*", model, text)
    assert found == 1, "the config needs one model, by the key mamba_pkd_timm_model"
    return re.sub(r"dst_ckpt: .*", "dst_ckpt:", text)


if __name__ == "__main__":
    main()
