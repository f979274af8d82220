"""Runs of `mamba-pkd train` that a benchmark compares."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

from torch.utils.data import Dataset

from timm_mamba_pkd.runner.trained import Trained


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what to train."""
    parser.add_argument("config", type=Path)
    parser.add_argument("--replace", nargs=2, action="append", default=[], metavar=("OLD", "NEW"), help="in the config")
    parser.add_argument(
        "--flags", type=shlex.split, default=[], help="of mamba-pkd train: --flags='--channels-last --amp'"
    )
    parser.add_argument("--output", type=Path, required=True)


def text_of_config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The config with what ``--replace`` asks for, and without ``dst_ckpt`` and ``cache_dir``."""
    text = args.config.read_text()
    for old, new in args.replace:
        if old not in text:
            parser.error(f"{args.config} has no {old!r}")
        text = text.replace(old, new)
    return re.sub(r"(?m)^ +cache_dir: .*\n", "", re.sub(r"dst_ckpt: .*", "dst_ckpt:", text))


def with_cache(text: str, folder: Path) -> str:
    """The config of a schedule with its logits cached in ``folder``."""
    return re.sub(r"(?m)^( +)rule: ", rf"\1cache_dir: '{folder}'\n\1rule: ", text)


def dataset_of(run: Trained, split: str, folder: Path) -> Dataset:
    """The data set of a run in ``folder`` that goes by the id ``split``; the program ends where there is none."""
    if split not in run.datasets:
        sys.exit(f"the config of {folder} has no data set {split!r}; it has {', '.join(run.datasets)}")
    return run.datasets[split]


def train(config: str, folder: Path, flags: list[str]) -> None:
    """One run into ``folder``, its config and log beside it; one that fails ends the program with its last line.

    `train` goes on where a run was stopped, repeats none that is finished, and refuses a folder of another config.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(config)
    command = [sys.executable, "-m", "timm_mamba_pkd", "train", "--config", str(path), "--output", str(folder), *flags]
    with folder.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the run as well, which saves before it ends
            process.wait()
            sys.exit(f"interrupted; the same command goes on (the run's log: {log.name})")
        log.seek(0)
        if code:
            said = log.read().splitlines() or [f"train ended with exit code {code}"]
            sys.exit(f"{said[-1]}\n(the end of {log.name})")
