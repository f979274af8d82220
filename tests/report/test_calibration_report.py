"""How a calibration reads, and what its plot shows."""

import copy
import importlib.util
import json
import logging
import re
from typing import Any

import pytest

from timm_mamba_pkd.report import calibration_to_markdown, calibration_to_text, plot_calibration, plots

needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs the extra [demo]")


def result(model: str, students: float | None, top1: float, macs: float, **more: float) -> dict[str, Any]:
    times = {"ms_at_batch_256": macs / 1e6, "ms_at_batch_1": 10 + macs / 1e6}
    return {"model": model, "students": students, "top1": top1, "macs": macs, **times, **more}


def student(k: int, left: int, auroc: float | None) -> dict[str, Any]:
    errors = {"ece_untempered": 0.2 / k, "ece": 0.02 / k}
    return {"k": k, "student": f"mamba_pkd_s{k}", "temperature": 0.5 * k, "exits_val": left + 1, "exits_test": left,
            "top1": 97.0 + k, **errors, "auroc": auroc}  # fmt: skip


DOCUMENT: dict[str, Any] = {
    "split": {"dataset_id": "digits/val", "samples": 180},
    "wanted": "no worse than all students",
    "measure": "max_prob",
    "policy": {"thresholds": [0.875, 0.875], "temperatures": [0.5, 1.0, 1.5]},
    "students": [student(1, 70, 0.95), student(2, 20, 0.5), student(3, 10, None)],
    "reliability": [
        [{"count": 100, "confidence": sure, "accuracy": right}] for sure, right in ((0.9, 0.8), (0.9, 0.9), (0.95, 1.0))
    ],
    "results": [
        result("early exit", 1.4, 99.5, 2e6),
        result("mamba_pkd_s1 alone", 1, 98.0, 1e6),
        result("all students", 3, 100.0, 8e6),
        result("teacher", None, 98.33, 80e6),
    ],
    "curve": [result("other threshold", 1 + n, 98 + n, (1 + n) * 1e6, threshold=n / 2) for n in range(3)],
}

INTRODUCTION = """\
An image leaves when its max_prob is above 0.875, fitted on 180 samples of digits/val.
Wanted there: no worse than all students.
All numbers below, but for 'leave (val)', are of the test set.
"""

TEXT = f"""\
{INTRODUCTION}
k  student       leave (val)  leave (test)  top-1 (%)  temperature  ECE before     ECE   AUROC
1  mamba_pkd_s1           71            70      98.00       0.5000      0.2000  0.0200  0.9500
2  mamba_pkd_s2           21            20      99.00       1.0000      0.1000  0.0100  0.5000
3  mamba_pkd_s3           11            10     100.00       1.5000      0.0667  0.0067  ######

model               students  top-1 (%)  MMACs  MACs (%)  ms/image at batch 256  time (%)  ms/image at batch 1  time (%)
early exit          1.4           99.50   2.00      25.0                   2.00      25.0                 12.0      66.7
mamba_pkd_s1 alone  1             98.00   1.00      12.5                   1.00      12.5                 11.0      61.1
all students        3            100.00   8.00       100                   8.00       100                 18.0       100
teacher                           98.33   80.0      1000                   80.0      1000                 90.0       500
""".replace("#", " ")


def test_text():
    assert calibration_to_text(DOCUMENT) == TEXT


def test_markdown_says_the_same():
    introduction, *tables = calibration_to_markdown(DOCUMENT).split("\n\n")
    assert f"{introduction}\n" == INTRODUCTION
    in_text = [part.splitlines() for part in TEXT.split("\n\n")[1:]]
    for table, lines in zip(tables, in_text, strict=True):
        heading, rule, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
        assert {cell.strip() for cell in rule} == {"---", "---:"} and len(rule) == len(heading)
        found = [[cell for cell in map(str.strip, row) if cell.strip("|")] for row in [heading, *rows]]
        assert found == [re.split(" {2,}", line.strip()) for line in lines]


def test_markdown_escapes_bars():
    document = copy.deepcopy(DOCUMENT)
    document["students"][0]["student"] = "a|b"
    document["results"][1]["model"] = "a|b alone"
    text = calibration_to_markdown(document)
    assert "| 1 | a\\|b | 71 |" in text and "| a\\|b alone | 1 |" in text


def test_it_can_be_read_back_from_json_and_without_a_teacher():
    document = json.loads(json.dumps(DOCUMENT))
    document["results"].pop()
    assert calibration_to_text(document) == TEXT[: TEXT.index("teacher  ")]


@needs_matplotlib
@pytest.mark.parametrize("teacher", [True, False])
def test_the_plot_shows_every_number(teacher, monkeypatch, tmp_path):
    document = copy.deepcopy(DOCUMENT)
    if not teacher:
        document["results"].pop()
    document["curve"][1]["ms_at_batch_256"] = 9.0  # slower than it should be: the line goes there and back
    ordered = list(document["curve"])
    document["curve"] = [ordered[i] for i in (1, 2, 0)]
    figures: list[Any] = []
    monkeypatch.setattr(
        "timm_mamba_pkd.report.calibration_report.save_figure", lambda figure, path: figures.append(figure)
    )
    plot_calibration(document, tmp_path / "calibration.png")
    (figure,) = figures
    figure.draw_without_rendering()
    reliability, exits, *trades = figure.axes
    assert [line.get_label() for line in reliability.lines[1:]] == ["after student 1", "after student 3"]
    assert [line.get_xydata().tolist() for line in reliability.lines[1:]] == [[[0.9, 0.8]], [[0.95, 1.0]]]
    assert [bar.get_height() for bar in exits.patches] == [70, 20, 10]
    for axes, cost, unit in zip(trades, ("macs", "ms_at_batch_256"), (1e6, 1), strict=True):
        curve, *points = axes.lines
        assert curve.get_xydata().tolist() == [[row[cost] / unit, row["top1"]] for row in ordered]
        found = {point.get_label(): point.get_xydata().tolist() for point in points}
        assert found == {row["model"]: [[row[cost] / unit, row["top1"]]] for row in document["results"]}
        assert len({(point.get_marker(), point.get_color()) for point in points}) == len(points)
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel()


@needs_matplotlib
def test_the_plot_is_written(tmp_path):
    plot_calibration(DOCUMENT, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_without_matplotlib_nothing_is_written(monkeypatch, tmp_path, caplog):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    plots.have_matplotlib.cache_clear()
    with caplog.at_level(logging.WARNING):
        plot_calibration(DOCUMENT, tmp_path / "calibration.png")
    plots.have_matplotlib.cache_clear()
    assert not list(tmp_path.iterdir())
    assert "matplotlib is missing" in caplog.text
