"""Accuracy against multiply-accumulates and against measured latency, of the results of several runs: one PNG file.

    python benchmarks/accuracy/plot.py runs/mnist/progressive/results.csv --output accuracy.png
    python benchmarks/accuracy/plot.py runs/cifar10/*/results.csv runs/peers/*/results.csv --output accuracy.png

Squares are students alone, the line the ensemble after each, triangles other networks, diamonds teachers. Latencies are
those of the runs, at batch size 1: they compare if the runs ended on the same quiet machine.
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from timm_mamba_pkd.models import STUDENTS
from timm_mamba_pkd.report import Row, read_csv
from timm_mamba_pkd.report.plots import BLUE, GREY, ORANGE

GREEN = "#009e73"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.csv of each run")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = [row for path in args.results for row in read_csv(path)]
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    by_macs, by_latency = figure.subplots(1, 2, sharey=True)
    draw(by_macs, [(1000 * row.gmacs, row) for row in rows])
    draw(by_latency, [(row.ms_per_image, row) for row in rows])
    by_macs.set(xlabel="multiply-accumulates per image (millions)", ylabel="top-1 accuracy (%)")
    by_latency.set(xlabel="latency at batch size 1 (ms)")
    figure.legend(*by_macs.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(args.output)


def draw(axes: Axes, points: list[tuple[float, Row]]) -> None:
    groups = {
        "teacher": ("D", GREY, [point for point in points if point[1].role == "teacher"]),
        "other network": ("^", GREEN, [p for p in points if p[1].role == "student" and p[1].model not in STUDENTS]),
        "student alone": ("s", ORANGE, [p for p in points if p[1].role == "student" and p[1].model in STUDENTS]),
        "ensemble of the first k": ("o-", BLUE, [point for point in points if point[1].role == "ensemble"]),
    }
    for label, (marker, color, group) in groups.items():
        if group:
            group.sort(key=lambda point: point[1].k or 0)
            axes.plot(*zip(*((x, row.top1) for x, row in group), strict=True), marker, color=color, label=label, ms=5)
        for x, row in group:
            name = f"k={row.k}" if row.role == "ensemble" else row.model.removeprefix("mamba_pkd_")
            axes.annotate(name, (x, row.top1), xytext=(4, 4), textcoords="offset points", fontsize=8, color=color)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.grid(which="both", alpha=0.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    main()
