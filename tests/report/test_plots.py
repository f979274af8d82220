import importlib.util
import itertools
import logging
import math
import random
from typing import Any

import pytest

from timm_mamba_pkd.report import Row, plot_accuracy_against_macs, plot_curves, plots

needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs the extra [demo]")


def make_rows(students: int, teacher: bool = True, seed: int = 0) -> list[Row]:
    """Accuracies within half a point of one another, as on MNIST."""
    choose = random.Random(seed)
    macs_pct = 1.0 if teacher else None
    rows = [Row("resnet18", "teacher", None, 99.4, 11.17, 0.556, 100.0, 3.0)] if teacher else []
    total = 0.0
    for k, gmacs in enumerate([0.0025, 0.005, 0.010, 0.015, 0.022, 0.028, 0.045][:students], start=1):
        total += gmacs
        alone = choose.uniform(99.0, 99.5)
        rows.append(Row(f"mamba_pkd_s{k}", "student", k, alone, 0.1, gmacs, macs_pct, 1.0))
        together = alone if k == 1 else choose.uniform(99.0, 99.5)
        rows.append(Row("mamba_pkd_ensemble", "ensemble", k, together, 0.1, total, macs_pct, 1.0))
    return rows


def make_metrics(stages: int, epochs: int = 3, students: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "stage": 1 + epoch // epochs,
            "student": f"mamba_pkd_s{1 + epoch // epochs}" if students else None,
            "epoch": epoch,
            "loss": 2.0 / (1 + epoch),
            "val_top1": 99 - 60 * math.exp(-2 * (epoch % epochs)),
            "val_top1_student": 98.5 - 70 * math.exp(-2 * (epoch % epochs)) if students else None,
            "lr": 1e-3,
            "img_per_s": 1e3,
            "seconds": 1.0,
        }
        for epoch in range(stages * epochs)
    ]


@needs_matplotlib
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize(("students", "seed"), [(1, 0), (2, 0), (3, 0), (3, 1), (7, 0), (7, 1)])
def test_no_label_covers_a_label_a_point_or_a_line(students, seed, teacher):
    figure = plots._accuracy_figure(make_rows(students, teacher, seed))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert sorted(text.get_text() for text in axes.texts) == sorted(
        ["teacher"] * teacher + [f"{name}{k}" for name in ("s", "k=") for k in range(1, students + 1)]
    )
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for line in axes.lines:
        path = line.get_transform().transform_path(line.get_path())
        assert not any(path.intersects_bbox(box, filled=False) for box in boxes)
        for point in axes.transData.transform(line.get_xydata()):
            assert not any(box.contains(*point) for box in boxes)
    assert all(axes.bbox.containsx(x) and axes.bbox.containsy(y) for box in boxes for x, y in box.corners())
    assert axes.get_title()
    assert "(millions)" in axes.get_xlabel()
    assert "(%)" in axes.get_ylabel()


@needs_matplotlib
@pytest.mark.parametrize("rows", [make_rows(0), make_rows(1, teacher=False)[:1]])
def test_one_row_is_drawn(rows, tmp_path):
    plot_accuracy_against_macs(rows, tmp_path / "accuracy_macs.png")
    assert (tmp_path / "accuracy_macs.png").read_bytes().startswith(b"\x89PNG")


@needs_matplotlib
@pytest.mark.parametrize(
    ("metrics", "names", "dividers"),
    [
        (make_metrics(1, students=False), [], 0),
        (make_metrics(1, epochs=1), [], 0),
        (make_metrics(3, students=False), ["stage 1", "stage 2", "stage 3"], 2),
        (make_metrics(7, epochs=1), [f"mamba_pkd_s{k}" for k in range(1, 8)], 6),
    ],
)
def test_curves_name_and_divide_the_stages(metrics, names, dividers):
    loss_axes, top1_axes = plots._curves_figure(metrics).axes
    assert [text.get_text() for text in loss_axes.texts] == names
    for axes, lines_per_stage in ((loss_axes, 1), (top1_axes, 1 if metrics[0]["student"] is None else 2)):
        assert len(axes.lines) == lines_per_stage * (dividers + 1) + dividers
        assert axes.get_ylabel()
    assert loss_axes.get_yscale() == "log"


@needs_matplotlib
def test_stage_names_that_do_not_fit_stand_upright():
    metrics = make_metrics(7)
    for entry in metrics:
        entry["student"] += "_with_a_long_name"
    loss_axes, _ = plots._curves_figure(metrics).axes
    assert {text.get_rotation() for text in loss_axes.texts} == {90}


@needs_matplotlib
def test_low_first_epoch_does_not_flatten_the_rest():
    _, top1_axes = plots._curves_figure(make_metrics(1, epochs=12)).axes
    bottom, top = top1_axes.get_ylim()
    assert 90 < bottom < 98.5
    assert 99 < top < 100


@needs_matplotlib
def test_nan_leaves_a_gap_said_in_the_log(tmp_path, caplog):
    metrics = make_metrics(2)
    metrics[3]["loss"] = math.nan
    metrics[4]["val_top1"] = math.inf
    with caplog.at_level(logging.WARNING):
        plot_curves(metrics, tmp_path / "curves.png")
    assert "loss is NaN or infinite in epochs [3]" in caplog.text
    assert "val_top1 is NaN or infinite in epochs [4]" in caplog.text
    for entry in metrics:
        entry["loss"] = math.nan
    plot_curves(metrics, tmp_path / "curves.png")
