"""What `mamba-pkd calibrate` found, as text, Markdown and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_mamba_pkd.report.plots import BLUE, GREY, ORANGE, have_matplotlib, save_figure
from timm_mamba_pkd.report.table import in_columns, in_markdown, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STUDENTS = ("k", "student", "leave (val)", "leave (test)", "top-1 (%)", "temperature", "ECE before", "ECE", "AUROC")


def calibration_to_text(document: Mapping[str, Any]) -> str:
    """The tables of a calibration, aligned for a terminal."""
    students, results = (in_columns(table) for table in _tables(document))
    return f"{_introduction(document)}\n\n{students}\n{results}"


def calibration_to_markdown(document: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    return "\n".join([f"{_introduction(document)}\n", *(in_markdown(table) for table in _tables(document))])


def _introduction(document: Mapping[str, Any]) -> str:
    split, policy = document["split"], document["policy"]
    return (
        f"An image leaves when its {document['measure']} is above {policy['thresholds'][0]:.6g}, fitted on "
        f"{split['samples']} samples of {split['dataset_id']}.\nWanted there: {document['wanted']}.\n"
        "All numbers below, but for 'leave (val)', are of the test set."
    )


def _tables(document: Mapping[str, Any]) -> list[list[Sequence[str]]]:
    students: list[Sequence[str]] = [_STUDENTS]
    for row in document["students"]:
        numbers = [f"{row[name]:.4f}" for name in ("temperature", "ece_untempered", "ece")]
        auroc = "" if row["auroc"] is None else f"{row['auroc']:.4f}"
        left = [str(row[name]) for name in ("exits_val", "exits_test")]
        students.append([str(row["k"]), row["student"], *left, f"{row['top1']:.2f}", *numbers, auroc])
    whole = next(row for row in document["results"] if row["model"] == "all students")
    times = [name for name in whole if name.startswith("ms_at_batch_")]
    headings = ["model", "students", "top-1 (%)", "MMACs", "MACs (%)"]
    for name in times:
        size = name.removeprefix("ms_at_batch_")
        headings += [f"ms/image at batch {size}", "time (%)"]
    results: list[Sequence[str]] = [headings]
    for row in document["results"]:
        used = "" if row["students"] is None else f"{row['students']:.3g}"
        cost = significant(row["macs"] / 1e6), _share(row, whole, "macs")
        cells = [row["model"], used, f"{row['top1']:.2f}", *cost]
        for name in times:
            cells += [significant(row[name]), _share(row, whole, name)]
        results.append(cells)
    return [students, results]


def _share(row: Mapping[str, Any], whole: Mapping[str, Any], name: str) -> str:
    return significant(100 * row[name] / whole[name])


def plot_calibration(document: Mapping[str, Any], path: str | Path) -> None:
    """Draw the reliability diagram, the histogram of exits, and accuracy against MACs and against time.

    Without matplotlib nothing is written and the log says how to get it.

    Args:
        document: what calibration.json holds.
        path: of the PNG file, replaced in one step. The folder must exist.
    """
    if not have_matplotlib():
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), dpi=150, layout="constrained")
    (reliability, exits), (macs, time) = figure.subplots(2, 2)
    _draw_reliability(reliability, document["reliability"])
    positions = [row["k"] for row in document["students"]]
    exits.bar(positions, [row["exits_test"] for row in document["students"]], color=BLUE)
    exits.set_xticks(positions)
    exits.set(title="Where images leave", xlabel="after student", ylabel="test images")
    _draw_trade(macs, document, "macs", 1e-6, "million multiply-accumulates an image, on average")
    name = next(name for name in document["results"][0] if name.startswith("ms_at_batch_"))
    _draw_trade(time, document, name, 1, f"ms an image, at batch {name.removeprefix('ms_at_batch_')}")
    save_figure(figure, path)


def _draw_reliability(axes: Axes, reliability: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
    for k, (bins, color) in {1: (reliability[0], ORANGE), len(reliability): (reliability[-1], BLUE)}.items():
        sure, right = ([part[name] for part in bins] for name in ("confidence", "accuracy"))
        axes.plot(sure, right, "-", color=color, label=f"after student {k}")
        count = sum(part["count"] for part in bins)
        axes.scatter(sure, right, [4 + 200 * part["count"] / count for part in bins], color=color)
    axes.set(title="Reliability (area: share of the images)", xlabel="largest probability, tempered", ylabel="accuracy")
    axes.legend(frameon=False)


def _draw_trade(axes: Axes, document: Mapping[str, Any], cost: str, unit: float, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    curve = sorted(document["curve"], key=lambda row: row["threshold"])  # times, measured, need not follow
    axes.plot([unit * row[cost] for row in curve], [row["top1"] for row in curve], ".-", color=BLUE, linewidth=1)
    markers = dict(zip(("early exit", "all students", "teacher"), ("*", "o", "D"), strict=True))
    for row in document["results"]:
        color = GREY if row["model"] == "teacher" else BLUE if row["model"] in markers else ORANGE
        axes.plot(
            unit * row[cost], row["top1"], markers.get(row["model"], "s"),
            color=color, label=row["model"],
            markersize=11 if row["model"] == "early exit" else 7, linestyle="none",
        )  # fmt: skip
    axes.set(xscale="log", xlabel=label, ylabel="top-1 accuracy (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False)
