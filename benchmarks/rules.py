"""Variants of a progressive config trained at equal budget, one after the other: tables of accuracies over seeds.

    python -m benchmarks.rules yaml_configs/digits/progressive.yaml --seeds 42 43 44 --output runs/rules/digits

Every variant trains the same students for the same epochs on the same views, from the same cached teacher logits, with
0.5 of cross-entropy on the labels beside the rule's own loss (`independent`: 0.5 of torchdistill's soft loss). Only
`bdistil_retry` may train a student twice.
Finished runs are kept: the command goes on where it was stopped.
"""

import argparse
import json
import re
import statistics
import sys
from typing import Any

from benchmarks.runs import add_recipe, text_of_config, train, with_cache
from timm_mamba_pkd.report import read_csv

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
    add_recipe(parser)
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    compared.add_argument("--num-views", type=int, nargs="+", help="compare numbers of views, by the config's rule")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    args = parser.parse_args()

    text = text_of_config(parser, args)
    if args.num_views:
        views = r"\1views: {{num_views: {}}}\n\1rule: "
        variants = {f"{n} views": re.sub(r"(?m)^( +)rule: ", views.format(n), text) for n in args.num_views}
    else:
        variants = {name: variant_of(text, **VARIANTS[name]) for name in args.variants}
    results: dict[str, dict[str, list[list[float]]]] = {"student": {}, "ensemble": {}}
    for name, config in variants.items():
        for seed in args.seeds:
            folder = args.output / f"{name.replace(' ', '_')}_{seed}"
            train(with_cache(config, args.output / "cache"), folder, ["--seed", str(seed), *args.flags])
            rows = read_csv(folder / "results.csv")
            for role, runs in results.items():
                runs.setdefault(name, []).append([row.top1 for row in rows if row.role == role])
                print(f"{name}, seed {seed}, {role}: {runs[name][-1]}", flush=True)
    print_table("each student alone", results["student"], len(args.seeds))
    print_table("the ensemble after k", results["ensemble"], len(args.seeds))


def variant_of(text: str, rule: Any, terms: dict[str, Any]) -> str:
    """The config with another rule and other terms beside it."""
    text, found = re.subn(r"(?m)^( +)rule: .*", lambda m: f"{m[1]}rule: {json.dumps(rule)}", text)
    criterion = json.dumps({"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}})
    text, criteria = re.subn(r"\bcriterion:\n.*?(?=\n\S)", f"criterion: {criterion}\n", text, count=1, flags=re.DOTALL)
    if not found == criteria == 1:
        sys.exit("the config must have one rule and one criterion, the last of the schedule's sections")
    return text


def print_table(title: str, results: dict[str, list[list[float]]], num_seeds: int) -> None:
    """Top-1 after each k: mean and, over several seeds, sample standard deviation."""
    count = max(len(runs[0]) for runs in results.values())
    print(f"\n| {title} | " + " | ".join(f"k = {k}" for k in range(1, count + 1)) + " |\n|---|" + "---:|" * count)
    for name, runs in results.items():
        cells = [
            f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if num_seeds > 1 else "")
            for values in zip(*runs, strict=True)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
