"""Variants of a progressive config trained at equal budget, one after the other: one table of accuracies over seeds.

    python benchmarks/rules.py yaml_configs/digits/progressive.yaml --seeds 42 43 44 --output runs/rules/digits

Every variant trains the same students for the same epochs on the same views, from the same cached teacher logits, with
0.5 of cross-entropy on the labels beside the rule's own loss (`independent`: 0.5 of torchdistill's soft loss). Only
`bdistil_retry` may train a student twice.
Finished runs are kept: the command goes on where it was stopped.
"""

import argparse
import csv
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

LOGITS = {
    "student_module_path": ".",
    "student_module_io": "output",
    "teacher_module_path": ".",
    "teacher_module_io": "output",
}
SELF = {"is_from_teacher": False, "module_path": ".", "io": "output"}
CE = {
    "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
    "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": {"input": SELF, "target": {"uses_label": True}}},
    "weight": 0.5,
}
KD = {
    "criterion": {"key": "KDLoss", "kwargs": {**LOGITS, "temperature": 4.0, "alpha": 0.5, "reduction": "batchmean"}},
    "weight": 1.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "independent": {"rule": "independent", "terms": {"kd": KD}},
    "residual": {"rule": "residual", "terms": {"ce": CE}},
    "bdistil": {"rule": {"key": "bdistil", "kwargs": {"max_retries": 0}}, "terms": {"ce": CE}},
    "bdistil_retry": {"rule": {"key": "bdistil", "kwargs": {"max_retries": 1}}, "terms": {"ce": CE}},
    "assistant": {"rule": "assistant", "terms": {"ce": CE}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--num-views", type=int, nargs="+", help="compare numbers of views (rule: the config's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
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
    variants = {name: variant_of(text, **VARIANTS[name]) for name in args.variants}
    if args.num_views:
        variants = {
            f"{n} views": re.sub(r"(?m)^( +)rule: ", rf"\1views: {{num_views: {n}}}\n\1rule: ", text)
            for n in args.num_views
        }
    results: dict[str, list[list[float]]] = {}
    for name, config in variants.items():
        for seed in args.seeds:
            folder = args.output / f"{name.replace(' ', '_')}_{seed}"
            if not (folder / "results.csv").exists():
                train(config, folder, seed, args.output / "cache", args.flags)
            with (folder / "results.csv").open() as file:
                rows = list(csv.DictReader(file))
            results.setdefault(name, []).append(
                [float(row["top1"]) for row in rows if row["model"].startswith("ensemble_")]
            )
            print(f"{name}, seed {seed}: {results[name][-1]}", flush=True)
    print_table(results, len(args.seeds))


def variant_of(text: str, rule: Any, terms: dict[str, Any]) -> str:
    """The config with another rule and other terms beside it."""
    text, found = re.subn(r"(?m)^( +)rule: .*", lambda m: f"{m[1]}rule: {json.dumps(rule)}", text)
    criterion = json.dumps({"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}})
    text, criteria = re.subn(r"\bcriterion:\n.*?(?=\n\S)", f"criterion: {criterion}\n", text, count=1, flags=re.DOTALL)
    assert found == criteria == 1, "the config needs one rule and one criterion, the last of the schedule's sections"
    return text


def train(config: str, folder: Path, seed: int, cache: Path, flags: list[str]) -> None:
    """One run of mamba-pkd train; a folder that an unfinished run has left is moved aside."""
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.unfinished{sum(1 for _ in folder.parent.iterdir())}"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = re.sub(r"(?m)^ +cache_dir: .*\n", "", re.sub(r"dst_ckpt: .*", "dst_ckpt:", config))
    config = re.sub(r"(?m)^( +)rule: ", rf"\1cache_dir: '{cache}'\n\1rule: ", config)
    path = folder.with_suffix(".yaml")
    path.write_text(config)
    command = [sys.executable, "-m", "timm_mamba_pkd", "train", "--config", str(path), "--output", str(folder)]
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run([*command, "--seed", str(seed), *flags], check=True, stdout=log, stderr=subprocess.STDOUT)


def print_table(results: dict[str, list[list[float]]], num_seeds: int) -> None:
    """Top-1 of the ensemble after each student: mean and, over several seeds, sample standard deviation."""
    count = max(len(runs[0]) for runs in results.values())
    print("\n| | " + " | ".join(f"k = {k}" for k in range(1, count + 1)) + " |\n|---|" + "---:|" * count)
    for name, runs in results.items():
        cells = [
            f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if num_seeds > 1 else "")
            for values in zip(*runs, strict=True)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
