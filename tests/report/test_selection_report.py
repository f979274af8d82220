"""How the answer of a selection reads, and what is in its files."""

import importlib.util
import itertools
import json
import random
import re

import pytest
import torch

from timm_mamba_pkd.report import (
    Candidate,
    Constraints,
    Table,
    describe_selection,
    plots,
    selection_to_html,
    selection_to_text,
    write_selection,
)


def make(name: str, kind: str, wrong: list[int], cost: float) -> Candidate:
    predictions = torch.zeros(1000, dtype=torch.int64)
    predictions[wrong] = 1
    return Candidate(name, kind, cost, cost / 10, 2 * cost, 3 * cost, predictions)


POOL = [
    make("resnet18", "teacher", [], 500),
    make("s1", "student", list(range(50)), 1),
    make("ensemble_2", "ensemble", list(range(30)), 2.5),
    make("ensemble_3", "ensemble", list(range(29)), 4),
    make("s3", "student", list(range(31)), 3),
]


def document(**limits: float) -> dict:
    table = Table(POOL, torch.zeros(1000, dtype=torch.int64))
    how = {candidate.name: f"run {candidate.name}\nnow" for candidate in POOL}
    return describe_selection(table, Constraints(**limits), how, {"samples_of": "digits/val", "notes": ["a note"]})


TEXT = """\
5 candidates on 1000 samples of digits/val
a note

To choose from, the cheapest first:
model       kind      top-1 (%)   95 % interval  MMACs  params (M)  memory (MiB)  ms/image
s1          student       95.00  ##############   1.00       0.100          2.00      3.00
ensemble_2  ensemble      97.00  ##############   2.50       0.250          5.00      7.50
ensemble_3  ensemble      97.10  ##############   4.00       0.400          8.00      12.0

Dropped:
model     kind     top-1 (%)     95 % interval  MMACs  params (M)  memory (MiB)  ms/image  why not
s3        student      96.90    ##############   3.00       0.300          6.00      9.00  S3
resnet18  teacher     100.00  ################    500        50.0          1000      1500  RESNET18

To run:
s1:
  run s1
  now
ensemble_2:
  run ensemble_2
  now
ensemble_3:
  run ensemble_3
  now
"""
REASONS = {
    "S3": "ensemble_2 is as good or better in everything",
    "RESNET18": "1400 % above --max-latency 100",
}


def test_text():
    text = re.sub(r"[\d.]+ to [\d.]+", lambda found: "#" * len(found[0]), selection_to_text(document(max_latency=100)))
    expected = TEXT
    for short, reason in REASONS.items():
        expected = expected.replace(short, reason)
    assert text == expected


def test_text_of_what_is_redundant():
    text = selection_to_text(document())
    assert "ensemble_2" in text.split("Dropped:")[0]
    assert "predicts as ensemble_2, which is cheaper, on all but 0.1 %" in text


def test_text_when_nothing_fits():
    text = selection_to_text(document(max_macs=0.5, min_accuracy=96))
    assert "Nothing keeps the constraints. The nearest miss:\n" in text
    assert text.endswith("To run the nearest miss:\ns1:\n  run s1\n  now\n")
    assert "100 % above --max-macs 0.5; 1.00 points below --min-accuracy 96" in text


def test_files(tmp_path):
    found = document(max_latency=100)
    write_selection(found, tmp_path)
    assert json.loads((tmp_path / "select.json").read_text()) == found
    assert found["front"] == ["s1", "ensemble_2", "ensemble_3"] and found["most_accurate"] == "ensemble_3"
    assert [candidate["name"] for candidate in found["candidates"]] == [
        "s1",
        "ensemble_2",
        "s3",
        "ensemble_3",
        "resnet18",
    ]
    by_name = {candidate["name"]: candidate for candidate in found["candidates"]}
    assert by_name["ensemble_3"]["against_best"] == [0, 0] and by_name["s1"]["against_best"][1] < 0
    assert by_name["ensemble_3"]["same_as"] == [1, 2] and not by_name["s3"]["pareto"]
    assert found["constraints"] == {"max_latency": 100} and found["nearest_miss"] is None
    missed = document(min_accuracy=100, max_macs=1)["nearest_miss"]
    assert missed["name"] == "s1" and [v["constraint"] for v in missed["violations"]] == ["min_accuracy"]
    expected = {"select.json", "select.html", *(["select.png"] if importlib.util.find_spec("matplotlib") else [])}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_page_needs_nothing_else_and_holds_no_markup_of_names():
    found = document()
    evil = "</script><script>alert(1)</script><!--\u2028"
    found["candidates"][0] |= {"name": evil, "how": evil}
    page = selection_to_html(found)
    assert page.count("<script") == page.count("</script>") == 2
    assert "alert(1)</script>" not in page and "\u2028" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/", "")
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data) == found


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs the extra [demo]")
@pytest.mark.parametrize("seed", range(4))
def test_plot(seed, random_table, random_constraints):
    table, constraints = random_table(seed), random_constraints(random.Random(seed))
    how = {candidate.name: "" for candidate in table.candidates}
    found = describe_selection(table, constraints, how, {})
    figure = plots._selection_figure(found)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert sorted(text.get_text() for text in axes.texts) == sorted(found["front"])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
