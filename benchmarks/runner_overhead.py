"""What `mamba-pkd train` costs beside torchdistill's bare box: checks of the loss, signals, checkpoints, records.

    python benchmarks/runner_overhead.py yaml_configs/digits/progressive.yaml --students mamba_pkd_s3

Both sides train boxes of the same config for the same epochs. They take turns step by step in one process, so that
other work on the machine hits both. Prints the median step of each side with its data loading, the median ratio of two
steps side by side, and what our side does after the steps of an epoch besides validating: checkpoint, weights, records.
That cost is fixed, so long epochs make it small; the overhead is of both, in an epoch of this config.
"""

import argparse
import logging
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchdistill.common.main_util import set_seed

from timm_mamba_pkd.runner import interrupts, train
from timm_mamba_pkd.runner.box import build_box
from timm_mamba_pkd.runner.check import check
from timm_mamba_pkd.runner.config import Job, prepare
from timm_mamba_pkd.runner.run_folder import RunFolder
from timm_mamba_pkd.runner.tracking import tracking
from timm_mamba_pkd.runner.train import Trainer

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--students", nargs="+", required=True, help="of the config's, to train alone")
    parser.add_argument("--epochs", type=int, default=3, help="of each student (default: 3)")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(shortened(args.config.read_text(), args.students, args.epochs))
        theirs, ours, after, steps = compare(config, RunFolder(Path(folder) / "run"))
    step, per_epoch = statistics.median(theirs), statistics.median(after)
    ratio = statistics.median(mine / bare for mine, bare in zip(ours, theirs, strict=True))
    print(f"{args.students}, {args.epochs} epochs of {steps} steps, {torch.get_num_threads()} CPU threads, seed 42")
    print(f"step: bare {1000 * step:.1f} ms, train {1000 * statistics.median(ours):.1f} ms, ratio {ratio:.4f}")
    print(f"after an epoch: {1000 * per_epoch:.0f} ms, {per_epoch / (steps * step):.2%} of its steps")
    print(f"overhead {ratio - 1 + per_epoch / (steps * step):.2%}")


def shortened(text: str, students: list[str], epochs: int) -> str:
    """The config with these students and epochs, a teacher without weights, and nothing written elsewhere."""
    text = re.sub(r"(students: &students) \[.*\]", rf"\1 {students}", text)
    text = re.sub(r"num_epochs: \d+", f"num_epochs: {epochs}", text)
    return re.sub(r"(?m)^ +(cache_dir|src_ckpt|dst_ckpt): .*\n", "", text)


def compare(config: Path, run: RunFolder) -> tuple[list[float], list[float], list[float], int]:
    """Seconds of each bare step, of each of ours, and of what follows each epoch's; and the steps of an epoch."""
    set_seed(42)
    bare, job = bare_loop(prepare(config, CPU)), prepare(config, CPU)
    estimates = check(job, CPU)
    next(bare)  # warms up
    theirs, ours, after = [], [], []

    class Turns(Trainer):
        """Our side, which lets the other have a step after each of its own."""

        def _train_steps(self, *args: Any) -> None:
            self.last = time.perf_counter()
            super()._train_steps(*args)

        def _step(self, *args: Any) -> float:
            loss = super()._step(*args)
            trained = time.perf_counter()
            next(bare)
            now = time.perf_counter()
            ours.append(trained - self.last)
            theirs.append(now - trained)
            self.last = now
            return loss

        def _save(self, *args: Any) -> None:
            started = time.perf_counter()
            super()._save(*args)
            self.saving = time.perf_counter() - started

        def _finish_epoch(self, stage: int) -> None:
            started, self.validating = time.perf_counter(), 0.0
            super()._finish_epoch(stage)
            after.append(self.saving + time.perf_counter() - started - self.validating)

    validate = train._validate

    def timed(*args: Any) -> dict[str, Any]:
        started = time.perf_counter()
        metrics = validate(*args)
        trainer.validating = time.perf_counter() - started
        return metrics

    train._validate = timed
    with run.locked(), interrupts.ending_on_signals(), tracking(job, run.path) as tracker:
        run.create(job.source.text, None, {}, {})
        trainer = Turns(job, run, CPU, train.Options(), estimates, tracker)
        trainer.train()
    return theirs, ours, after, len(trainer.box.train_data_loader)


def bare_loop(job: Job) -> Iterator[None]:
    """The loop of torchdistill's example script without its logging and checkpoints, step by step, and one before."""
    box: Any = build_box(job, CPU)
    images, targets, supp_dict = next(iter(box.train_data_loader))
    box.forward_process(images, targets, supp_dict)
    yield
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for images, targets, supp_dict in box.train_data_loader:
            loss = box.forward_process(images.to(CPU), targets.to(CPU), supp_dict)
            box.post_forward_process(loss=loss)
            yield
        box.post_epoch_process(metrics=0.0)


if __name__ == "__main__":
    main()
