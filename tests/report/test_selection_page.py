"""The page of a selection in a real browser: Chromium, which ``pip install '.[browser]'`` brings."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from timm_mamba_pkd.report import Constraints, describe_selection, selection_to_html

BROWSER = Path(__file__).with_name("browser.py")
MARK = "<img src=x onerror=\"console.error('run')\"><b>bold</b></script>"
FRONT = "[...document.querySelectorAll('tr.front')].map(row => row.cells[0].textContent)"
POINTS = "[...document.querySelectorAll('.point.front')].map(point => point.getAttribute('aria-label').split(',')[0])"


def browse(tmp_path: Path, steps: list[Any], flags: str = "") -> list[Any]:
    """The results of the steps; the page must say nothing on its console."""
    if importlib.util.find_spec("PySide6") is None or importlib.util.find_spec("PySide6.QtWebEngineWidgets") is None:
        pytest.skip("no browser: pip install '.[browser]' brings Chromium")
    file = tmp_path / "steps.json"
    file.write_text(json.dumps(steps))
    environment = {**os.environ, "TEST_BROWSER_FLAGS": flags}
    found = subprocess.run([sys.executable, BROWSER, file], capture_output=True, text=True, env=environment, timeout=90)
    if found.returncode == 77:
        pytest.skip(f"Chromium cannot start: {found.stdout.strip()}")
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    assert answer["console"] == []
    return answer["results"]


def put(name: str, value: Any, event: str = "input") -> list[str]:
    """Give an element of the page a value, as a user does."""
    code = f"(document.getElementById('{name}').value = '{value}', "
    return ["js", code + f"document.getElementById('{name}').dispatchEvent(new Event('{event}')))"]


def write(table: Any, constraints: Constraints, path: Path, **names: str) -> dict[str, Any]:
    how = {candidate.name: f"run {candidate.name}" for candidate in table.candidates}
    document = describe_selection(table, constraints, how, {"samples_of": "random numbers", "notes": [MARK]})
    for candidate in document["candidates"]:
        candidate["name"] = names.get(candidate["name"], candidate["name"])
    path.write_text(selection_to_html(document), encoding="utf-8")
    return document


def test_the_page_chooses_as_python_does(tmp_path, random_table, random_constraints):
    """Front, reasons and nearest miss, for many constraints on several tables."""
    steps: list[Any] = []
    expected: list[Any] = []
    for seed in range(8):
        table, choose = random_table(seed), random.Random(seed)
        page = tmp_path / f"{seed}.html"
        document = write(table, Constraints(), page)
        position = {candidate["name"]: i for i, candidate in enumerate(document["candidates"])}
        steps.append(["load", str(page)])
        expected.append(True)
        for _ in range(25):
            constraints = random_constraints(choose)
            selection = table.select(constraints)
            place = [position[candidate.name] for candidate in table.candidates]
            nearest = None if selection.nearest is None else place[selection.nearest]
            kept = [not verdict.violations for _, verdict in sorted(zip(place, selection.verdicts, strict=True))]
            limits = json.dumps(constraints.given())
            code = f"(({{front, nearest, broken}}) => [front, nearest, broken.map(b => !b.length)])(choose({limits}))"
            steps.append(["js", code])
            expected.append([[place[i] for i in selection.front], nearest, kept])
    assert browse(tmp_path, steps) == expected


@pytest.mark.parametrize("dark", [False, True])
def test_what_a_user_does(tmp_path, random_table, dark):
    table = random_table(27, min_disagreement=0)
    names = [candidate.name for candidate in table.candidates]
    document = write(table, Constraints(), tmp_path / "page.html", **{names[0]: MARK})
    front = [c["name"] for c in document["candidates"] if c["status"] == "front"]
    macs = sorted(candidate.macs for candidate in table.candidates)
    limit = (macs[0] + macs[-1]) / 2
    within = [MARK if i == 0 else names[i] for i in table.select(Constraints(max_macs=limit)).front]
    place = "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
    place += "(document.querySelector('.point.front .ring').getBoundingClientRect())"
    steps = {
        "load": ["load", str(tmp_path / "page.html")],
        "scheme": ["js", "matchMedia('(prefers-color-scheme: dark)').matches"],
        "background": ["js", "getComputedStyle(document.body).backgroundColor"],
        "about": ["js", "document.getElementById('about').textContent"],
        "markup": ["js", "document.querySelectorAll('img, b').length"],
        "front": ["js", FRONT],
        "points": ["js", POINTS],
        "first point": ["js", place],
        "limit": put("max_macs", limit),
        "within": ["js", FRONT],
        "slider": ["js", "Number(document.getElementById('max_macs-slider').value)"],
        "wrong": put("max_macs", -1),
        "invalid": ["js", "document.getElementById('max_macs').getAttribute('aria-invalid')"],
        "unlimited": ["js", FRONT],
        "slide": put("min_accuracy-slider", 1000),
        "accuracy": ["js", "[limits.min_accuracy, document.getElementById('min_accuracy').value]"],
        "summary": ["js", "document.getElementById('summary').textContent"],
        "focus": ["js", "document.getElementById('min_accuracy-slider').focus()"],
        "down": ["key", "Left", 10],
        "lower": ["js", "limits.min_accuracy < 100"],
        "clear": ["js", "document.getElementById('clear').click()"],
        "cleared": ["js", FRONT],
        "before": ["js", "[...document.querySelectorAll('.point')].map(point => point.getAttribute('transform'))"],
        "axis": put("axis", "latency", "change"),
        "axis name": ["js", "document.getElementById('axis-name').textContent"],
        "after": ["js", "[...document.querySelectorAll('.point')].map(point => point.getAttribute('transform'))"],
        "to the chart": ["js", "document.getElementById('clear').focus()"],
        "tab": ["key", "Tab", 1],
        "focused": ["js", "document.activeElement.getAttribute('aria-label').split(',')[0]"],
        "told": ["js", "document.querySelector('#details h2').textContent"],
        "scroll": ["js", "scrollTo(0, 0)"],
        "grab": ["grab", str(tmp_path / "page.png")],
    }
    flags = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    found = dict(zip(steps, browse(tmp_path, list(steps.values()), flags), strict=True))
    assert found["scheme"] == dark and found["background"] == ("rgb(22, 23, 26)" if dark else "rgb(255, 255, 255)")
    assert found["markup"] == 0 and found["about"].endswith(MARK)
    assert (
        found["front"] == found["unlimited"] == found["cleared"] == front and MARK in found["front"] + found["within"]
    )
    assert sorted(found["points"]) == sorted(front)
    assert found["within"] == within != front and 0 < found["slider"] < 1000
    assert found["invalid"] == "true"
    assert found["accuracy"] == [100, "100"] and found["lower"]
    assert found["summary"].startswith("Nothing keeps the constraints. The nearest miss: ")
    assert "2.5 points below --min-accuracy 100" in found["summary"]
    assert found["axis name"] == "Latency at batch size 1 (ms)" and found["before"] != found["after"]
    assert found["told"].startswith(found["focused"])
    assert (tmp_path / "page.png").stat().st_size > 10_000
    hover = [steps["load"], steps["scroll"], ["hover", 5, 5], ["hover", *found["first point"]], steps["told"]]
    assert browse(tmp_path, hover)[-1].startswith(found["points"][0])
