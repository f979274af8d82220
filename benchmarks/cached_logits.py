"""Speed of distilling: torchdistill's own loop, `mamba-pkd train` without cached logits, and with them, on one config.

    python -m benchmarks.cached_logits yaml_configs/mnist/progressive.yaml --output runs/cached_logits

All sides train torchdistill's stock box with the same data, views and recipe, one after the other in one command; the
first one does not validate, so that from its second epoch on it sees the samples in other orders. In the first two the
teacher (and the earlier students) run at every step; in the third the cache starts empty. Prints, of each side, the
seconds of the training loops, images per second in each stage, and top-1 of the ensemble after each student.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torchdistill.common.main_util import set_seed
from tqdm import tqdm

from benchmarks.runs import add_recipe, text_of_config, train, with_cache
from timm_mamba_pkd.models import MambaPKDEnsemble
from timm_mamba_pkd.report import read_csv
from timm_mamba_pkd.runner.box import build_box
from timm_mamba_pkd.runner.config import prepare
from timm_mamba_pkd.runner.evaluate import evaluate_ensemble

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe(parser)
    args = parser.parse_args()
    text = text_of_config(parser, args)
    cache = (args.output / "cache").resolve()
    if cache.exists():
        parser.error(f"{cache} exists: the cache must start empty; choose another --output")
    cached = with_cache(text, cache)
    args.output.mkdir(parents=True, exist_ok=True)
    totals = []
    for name, run, side in (("torchdistill", bare, text), ("live", trained, text), ("cached", trained, cached)):
        seconds, images, accuracy = run(side, args.output / name, args.flags)
        totals.append(sum(seconds))
        print(f"{name}: {totals[-1]:.0f} s, {totals[0] / totals[-1]:.2f} times as fast as torchdistill's loop")
        print("  images/s in each stage: " + " ".join(f"{n / s:.0f}" for n, s in zip(images, seconds, strict=True)))
        print("  top-1 of the ensemble after each student: " + " ".join(f"{each:.2f}" for each in accuracy), flush=True)


Speeds = tuple[list[float], list[float], list[float]]


def bare(config: str, folder: Path, flags: list[str]) -> Speeds:
    """torchdistill's box in the loop of its example script: seconds and images of each stage, top-1 after each k."""
    set_seed(42)
    path = folder.with_suffix(".yaml")
    path.write_text(config)
    job = prepare(path, CPU)
    assert job.teacher is not None and isinstance(job.student, MambaPKDEnsemble)
    if "--channels-last" in flags:
        for model in (job.teacher, job.student):
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    box: Any = build_box(job, CPU)
    seconds, images = [[0.0] * len(job.student.names) for _ in range(2)]
    for epoch in tqdm(range(box.num_epochs), "torchdistill", disable=None):
        stage = box.stage_number - 1
        box.pre_epoch_process(epoch=epoch)
        started = time.perf_counter()
        for batch, targets, supp_dict in box.train_data_loader:
            with torch.autocast("cpu", enabled="--amp" in flags):
                loss = box.forward_process(batch, targets, supp_dict)
            box.post_forward_process(loss=loss)
            images[stage] += len(targets)
        seconds[stage] += time.perf_counter() - started
        box.post_epoch_process(metrics=0.0)
    return seconds, images, evaluate_ensemble(job.student, job.test_loader, CPU)[1]


def trained(config: str, folder: Path, flags: list[str]) -> Speeds:
    """The same of `mamba-pkd train`."""
    train(config, folder, flags)
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds, images = [[0.0] * epochs[-1]["stage"] for _ in range(2)]
    for epoch in epochs:
        seconds[epoch["stage"] - 1] += epoch["seconds"]
        images[epoch["stage"] - 1] += epoch["seconds"] * epoch["img_per_s"]
    rows = read_csv(folder / "results.csv")
    return seconds, images, [row.top1 for row in rows if row.role == "ensemble"]


if __name__ == "__main__":
    main()
