"""A progressive config trained with cached logits and with the teacher (and earlier students) run at every step.

    python benchmarks/cached_logits.py yaml_configs/mnist/progressive.yaml --output runs/cached_logits

Both sides are torchdistill's stock box under mamba-pkd train, with the same data, views and recipe, one after the other
in one command; the cache starts empty. A third run finds the cache filled. Prints the seconds of the training loops,
their ratio, and the accuracy of every side.
"""

import argparse
import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--replace", nargs=2, action="append", default=[], metavar=("OLD", "NEW"), help="in the config")
    parser.add_argument(
        "--flags", type=shlex.split, default=[], help="of mamba-pkd train: --flags='--channels-last --amp'"
    )
    args = parser.parse_args()
    text = args.config.read_text()
    for old, new in args.replace:
        if old not in text:
            parser.error(f"{args.config} has no {old!r}")
        text = text.replace(old, new)
    text = re.sub(r"(?m)^ +cache_dir: .*\n", "", re.sub(r"dst_ckpt: .*", "dst_ckpt:", text))
    cache = (args.output / "cache").resolve()
    if cache.exists():
        parser.error(f"{cache} exists: the cache must start empty; choose another --output")
    cached = re.sub(r"(?m)^( +)rule: ", rf"\1cache_dir: '{cache}'\n\1rule: ", text)
    seconds = {}
    for name, config in (("live", text), ("cached", cached), ("cached again", cached)):
        folder = args.output / name.replace(" ", "_")
        seconds[name], accuracy = train(config, folder, args.flags)
        ratio = f", {seconds['live'] / seconds[name]:.2f} times as fast as live" if name != "live" else ""
        print(f"{name}: {seconds[name]:.0f} s{ratio}; top-1 of the ensemble after each student: {accuracy}", flush=True)


def train(config: str, folder: Path, flags: list[str]) -> tuple[float, list[float]]:
    """Seconds of all training epochs, and top-1 of the ensemble after each student."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(config)
    command = [sys.executable, "-m", "timm_mamba_pkd", "train", "--config", str(path), "--output", str(folder)]
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run([*command, *flags], check=True, stdout=log, stderr=subprocess.STDOUT)
    seconds = sum(json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines())
    with (folder / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["model"].startswith("ensemble_")]
    return seconds, [float(row["top1"]) for row in rows]


if __name__ == "__main__":
    main()
