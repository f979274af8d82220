"""The combinations of a run's students: top-1 after each student so far, on the validation split, cross-fitted.

    python -m benchmarks.combinations runs/mnist/progressive mnist/val

Each half of the split is predicted with weights that were fitted on the other half, as training fits them, so every
image is tested once by weights that have not seen it; the mean needs no fit.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.runs import dataset_of
from timm_mamba_pkd.models import MambaPKDEnsemble, load_weights
from timm_mamba_pkd.models.combination import COMBINATIONS, fit_weights
from timm_mamba_pkd.runner.trained import prepare_trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("split", help="id of the validation split in the run's config")
    args = parser.parse_args()

    run = prepare_trained(args.run / "config.yaml")
    ensemble = run.model
    if not isinstance(ensemble, MambaPKDEnsemble):
        sys.exit(f"{args.run} is no run of an ensemble")
    dataset = dataset_of(run, args.split, args.run)
    load_weights(ensemble, args.run / "weights" / "ensemble.safetensors")
    logits, targets = logits_of(ensemble, DataLoader(dataset, 500))
    count = len(logits)
    print("| top-1 (%) | " + " | ".join(f"k = {k}" for k in range(1, count + 1)) + " |\n|---|" + "---:|" * count)
    for name in COMBINATIONS:
        cells = [f"{top1(logits[:k], targets, name):.2f}" for k in range(1, count + 1)]
        print(f"| `{name}` | " + " | ".join(cells) + " |")


@torch.inference_mode()
def logits_of(ensemble: MambaPKDEnsemble, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """The students' logits (k, N, C), float32, and the labels (N,)."""
    batches = [(ensemble.student_logits(images), targets) for images, targets in tqdm(loader, disable=None)]
    return torch.cat([logits for logits, _ in batches], 1), torch.cat([targets for _, targets in batches])


def top1(logits: Tensor, targets: Tensor, combination: str) -> float:
    """Top-1 in percent of the first k students together; ``logits`` (k, N, C), ``targets`` (N,)."""
    halves = torch.randperm(len(targets), generator=torch.Generator().manual_seed(42)).chunk(2)
    right = 0
    for fitted_on, tested in (halves, halves[::-1]):
        weights = torch.ones(len(logits)) / len(logits)
        if combination != "mean":
            weights = fit_weights(logits[:, fitted_on], targets[fitted_on], combination == "per_class")
        together = (weights.reshape(len(logits), 1, -1) * logits[:, tested]).sum(0)
        right += int((together.argmax(-1) == targets[tested]).sum())
    return 100 * right / len(targets)


if __name__ == "__main__":
    main()
