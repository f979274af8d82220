"""Plots of results and of training. matplotlib is imported when they are drawn; without it they are skipped."""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_mamba_pkd.files import write_file
from timm_mamba_pkd.report.table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

_logger = logging.getLogger(__name__)

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#444444"  # told apart by colour-blind readers too


def plot_accuracy_against_macs(rows: Sequence[Row], path: str | Path) -> None:
    """Draw top-1 accuracy over MACs: each student alone, the ensemble after k students, the teacher as a dashed line.

    Without matplotlib nothing is written and the log says how to get it.

    Args:
        rows: at least one, in any order.
        path: of the PNG file, replaced in one step. The folder must exist.
    """
    if have_matplotlib():
        save_figure(_accuracy_figure(rows), path)


def plot_curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw the training loss and the validation accuracy over the epochs, with the stages set apart and named.

    Numbers that are NaN or infinite leave gaps, which the log reports. Without matplotlib nothing is written and the
    log says how to get it. First epochs far below the others run out of the lower panel.

    Args:
        metrics: one mapping per epoch, at least one, in order. Read are "stage" (int), "student" (its name, or None),
            "epoch" (int from 0, over all stages), "loss", "val_top1" (percent, of all trained so far) and
            "val_top1_student" (percent, of the stage's student alone, or None).
        path: of the PNG file, replaced in one step. The folder must exist.
    """
    if have_matplotlib():
        save_figure(_curves_figure(metrics), path)


def plot_selection(document: Mapping[str, Any], path: str | Path) -> None:
    """Draw top-1 accuracy over MACs of a selection's candidates, with the intervals of those on the front.

    Without matplotlib nothing is written and the log says how to get it.

    Args:
        document: of `describe_selection`.
        path: of the PNG file, replaced in one step. The folder must exist.
    """
    if have_matplotlib():
        save_figure(_selection_figure(document), path)


@functools.cache
def have_matplotlib() -> bool:
    """Whether plots can be drawn; the log says how to get what is missing, once."""
    if importlib.util.find_spec("matplotlib"):
        return True
    _logger.warning("no plots: matplotlib is missing; pip install 'timm-mamba-pkd[demo]' brings it")
    return False


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG file in one step."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=figure.dpi)
    write_file(path, png.getvalue())


def _accuracy_axes() -> tuple[Figure, Axes]:
    """A figure of accuracies over multiply-accumulates, still empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set(
        xscale="log",
        xlabel="multiply-accumulates per image (millions)",
        ylabel="top-1 accuracy (%)",
        title="Accuracy against compute",
    )
    return figure, axes


def _finish_accuracy(figure: Figure, axes: Axes, labels: Sequence[Annotation]) -> None:
    """Limits, grid, ticks, legend, and the places of the labels."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.margins(x=0.1, y=0.12)
    bottom, top = axes.get_ylim()
    axes.set_ylim(top=min(top, 100 + 0.12 * (100 - bottom)))
    axes.grid(which="both", alpha=0.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    _spread(axes, labels)


def _accuracy_figure(rows: Sequence[Row]) -> Figure:
    figure, axes = _accuracy_axes()
    labels = []
    for row in (row for row in rows if row.role == "teacher"):
        axes.axhline(row.top1, color=GREY, linestyle="--", linewidth=1)
        axes.plot(1000 * row.gmacs, row.top1, "D", color=GREY, label=f"teacher ({row.model})")
        labels.append(_label(axes, (1000 * row.gmacs, row.top1), "teacher", GREY))
    ensembles = sorted((row for row in rows if row.role == "ensemble"), key=lambda row: row.k or 0)
    if ensembles:
        macs, top1 = [1000 * row.gmacs for row in ensembles], [row.top1 for row in ensembles]
        axes.plot(macs, top1, "o-", color=BLUE, markersize=8, label="ensemble of the first k students")
        labels += [_label(axes, (x, y), f"k={row.k}", BLUE) for row, x, y in zip(ensembles, macs, top1, strict=True)]
    students = [row for row in rows if row.role == "student"]
    if students:
        macs, top1 = [1000 * row.gmacs for row in students], [row.top1 for row in students]
        axes.plot(macs, top1, "s", color=ORANGE, markersize=4, label="student alone")
        labels += [_label(axes, (x, y), f"s{row.k}", ORANGE) for row, x, y in zip(students, macs, top1, strict=True)]
    _finish_accuracy(figure, axes, labels)
    return figure


def _selection_figure(document: Mapping[str, Any]) -> Figure:
    figure, axes = _accuracy_axes()
    front = [candidate for candidate in document["candidates"] if candidate["status"] == "front"]
    dropped = [candidate for candidate in document["candidates"] if candidate["status"] != "front"]
    labels = []
    if dropped:
        macs, top1 = [candidate["macs"] for candidate in dropped], [candidate["accuracy"] for candidate in dropped]
        axes.plot(macs, top1, "o", color=GREY, markersize=4, alpha=0.5, label="dropped")
    if front:
        macs, top1 = [candidate["macs"] for candidate in front], [candidate["accuracy"] for candidate in front]
        axes.plot(macs, top1, "o", color=BLUE, markersize=7, label="front, with intervals")
        axes.vlines(macs, *zip(*(candidate["interval"] for candidate in front), strict=True), color=BLUE, alpha=0.3)
        names = [candidate["name"] for candidate in front]
        labels = [_label(axes, (x, y), name, BLUE) for name, x, y in zip(names, macs, top1, strict=True)]
    limit = document["constraints"].get("max_macs")
    if limit is not None:
        axes.axvline(limit, color=ORANGE, linestyle="--", linewidth=1, label="limit")
    limit = document["constraints"].get("min_accuracy")
    if limit is not None:
        axes.axhline(limit, color=ORANGE, linestyle="--", linewidth=1)
    _finish_accuracy(figure, axes, labels)
    return figure


def _label(axes: Axes, point: tuple[float, float], text: str, color: str) -> Annotation:
    return axes.annotate(
        text,
        point,
        xytext=(0, 0),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=9,
        color=color,
        in_layout=False,
    )


def _lay_out(axes: Axes) -> Figure:
    """Fix the limits and the place of `axes`, in which texts are measured."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def _spread(axes: Axes, labels: Sequence[Annotation]) -> None:
    """Move each label from its point to the nearest place where it covers neither a point, a line, nor a label."""
    from matplotlib.transforms import Bbox

    pixels_per_point = _lay_out(axes).dpi / 72
    lines = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    taken = [
        Bbox.from_bounds(x, y, 0, 0).padded(5 * pixels_per_point)
        for x, y in (axes.transData.transform(label.xy) for label in labels)
    ]
    for label in labels:
        for distance, turn in [(distance, turn) for distance in range(14, 60, 3) for turn in range(16)]:
            angle = math.pi / 2 + turn * math.pi / 8
            label.set_position((distance * math.cos(angle), distance * math.sin(angle)))
            box = label.get_window_extent().padded(1.5 * pixels_per_point)
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            inside = inside and axes.bbox.containsy(box.y0) and axes.bbox.containsy(box.y1)
            free = not any(box.overlaps(other) for other in taken)
            if inside and free and not any(line.intersects_bbox(box, filled=False) for line in lines):
                break
        taken.append(label.get_window_extent())


def _curves_figure(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    loss_axes, top1_axes = figure.subplots(2, 1, sharex=True)
    figure.suptitle("Training")
    loss_axes.set_ylabel("training loss")
    top1_axes.set(xlabel="epoch", ylabel="validation top-1 (%)")
    top1_axes.set_xlim(metrics[0]["epoch"] - 0.5, metrics[-1]["epoch"] + 0.5)
    top1_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    stages = [list(entries) for _, entries in groupby(metrics, key=lambda entry: entry["stage"])]
    losses = _draw_stages(loss_axes, stages, "loss", GREY, "-", "training loss")
    top1s = _draw_stages(top1_axes, stages, "val_top1", BLUE, "-", "all students so far")
    if any(entry["val_top1_student"] is not None for entry in metrics):
        top1s += _draw_stages(top1_axes, stages, "val_top1_student", ORANGE, "--", "the stage's student alone")
        figure.legend(*top1_axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    if losses and min(losses) > 0:
        loss_axes.set_yscale("log")
    if len(top1s) > 1:
        _leave_out_low_starts(top1_axes, top1s)
    for axes in (loss_axes, top1_axes):
        axes.grid(alpha=0.2)
        for stage in stages[1:]:
            axes.axvline(stage[0]["epoch"] - 0.5, color=GREY, linewidth=0.8)
    if len(stages) > 1:
        _name_stages(loss_axes, stages)
    return figure


def _draw_stages(
    axes: Axes, stages: Sequence[Sequence[Mapping[str, Any]]], key: str, color: str, style: str, name: str
) -> list[float]:
    """Draw one line per stage, since each stage starts from another network; return the finite values."""
    finite = []
    for index, stage in enumerate(stages):
        epochs = [entry["epoch"] for entry in stage]
        values = [math.nan if entry[key] is None else entry[key] for entry in stage]
        axes.plot(epochs, values, style, color=color, marker=".", label=name if index == 0 else None)
        finite += [value for value in values if math.isfinite(value)]
        broken = [entry["epoch"] for entry in stage if entry[key] is not None and not math.isfinite(entry[key])]
        if broken:
            _logger.warning("%s is NaN or infinite in epochs %s: left out of the plot", key, broken)
    return finite


def _leave_out_low_starts(axes: Axes, values: Sequence[float]) -> None:
    """End the axis where the box plot's whisker ends, lest the first epochs flatten all that follow."""
    lower, _, upper = statistics.quantiles(values, method="inclusive")
    bottom = lower - 1.5 * max(upper - lower, 0.5)
    if bottom > min(values):
        axes.set_ylim(bottom, max(values) + 0.05 * (max(values) - bottom))


def _name_stages(axes: Axes, stages: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Write each stage's name over its epochs, upright where the names would not fit side by side."""
    names = [
        axes.annotate(
            stage[0]["student"] or f"stage {stage[0]['stage']}",
            ((stage[0]["epoch"] + stage[-1]["epoch"]) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
        for stage in stages
    ]
    _lay_out(axes)
    boxes = [name.get_window_extent().padded(3) for name in names]
    if any(left.overlaps(right) for left, right in pairwise(boxes)):
        for name in names:
            name.set_rotation(90)
