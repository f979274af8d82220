"""Put the weights of a finished run of s1 to s7 into the package, in half precision where that costs next to nothing.

    python -m benchmarks.accuracy.pack runs/mnist/progressive mnist/val timm_mamba_pkd/weights/mnist.safetensors

Prints top-1 on the validation split, of each student and of the ensemble after each, in single and in half precision.
The weights are written in half precision unless one of these falls by 0.05 points or more. The policy of early exit and
the batch norms' counters stay as they are. Beside them, as mnist.md, goes what model cards say of the run.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.runs import dataset_of
from timm_mamba_pkd.models import STUDENTS, MambaPKDEnsemble, load_weights
from timm_mamba_pkd.runner.card import sections_of_run
from timm_mamba_pkd.runner.run_folder import RunFolder
from timm_mamba_pkd.runner.trained import Trained, prepare_trained

MOST = 0.05  # points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("split", help="id of the validation split in the run's config")
    parser.add_argument("output", type=Path)
    parser.add_argument("--note", help="on the data, for model cards")
    args = parser.parse_args()

    run = prepare_trained(args.run / "config.yaml")
    ensemble = run.model
    if not isinstance(ensemble, MambaPKDEnsemble) or ensemble.names != tuple(STUDENTS):
        sys.exit(f"{args.run} is no run of all seven students ({', '.join(STUDENTS)})")
    load_weights(ensemble, args.run / "weights" / "ensemble.safetensors")
    loader = DataLoader(dataset_of(run, args.split, args.run), 500)
    before = top1(ensemble, loader)
    state = {name: halved(name, tensor) for name, tensor in ensemble.state_dict().items()}
    ensemble.load_state_dict(state)
    after = top1(ensemble, loader)
    for k, name in enumerate(ensemble.names, start=1):
        rows = [*zip(before, after, strict=True)]
        alone, together = (f"{float(one[k - 1]):.2f} -> {float(two[k - 1]):.2f}" for one, two in rows)
        print(f"{name}: alone {alone}, after {k} together {together}")
    lost = max(float((one - two).max()) for one, two in zip(before, after, strict=True))
    if lost >= MOST:
        load_weights(ensemble, args.run / "weights" / "ensemble.safetensors")
        state = ensemble.state_dict()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, args.output, metadata={"format": "pt"})
    precision, megabytes = "single" if lost >= MOST else "half", args.output.stat().st_size / 1e6
    print(f"{args.output}: {precision} precision, {megabytes:.1f} MB; at most {lost:.2f} points lost")
    write_card(RunFolder(args.run), run, args.output, args.note)


def write_card(run: RunFolder, config: Trained, weights: Path, note: str | None) -> None:
    sections = sections_of_run(run, config)
    if note:
        sections["Data"] += f"\n\n{note}"
    text = "\n".join(f"## {heading}\n\n{body}\n" for heading, body in sections.items())
    weights.with_suffix(".md").write_text(text, encoding="utf-8")


def halved(name: str, tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() and not name.startswith("policy.") else tensor


@torch.inference_mode()
def top1(ensemble: MambaPKDEnsemble, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """Top-1 in percent (N,) of each student alone, and of the ensemble after each."""
    right = torch.zeros(2, len(ensemble.students), dtype=torch.float64)
    count = 0
    for images, targets in tqdm(loader, disable=None):
        alone = ensemble.student_logits(images)
        for row, logits in zip(right, (alone, ensemble.combine(alone)), strict=True):
            row += (logits.argmax(-1) == targets).sum(-1)
        count += len(targets)
    alone, together = 100 * right / count
    return alone, together


if __name__ == "__main__":
    main()
