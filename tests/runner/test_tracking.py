"""torchdistill's tracker: named in the config, told every epoch, never in the way."""

import json
from pathlib import Path
from typing import Any

import pytest

FAKE = """
import json
def write(*what):
    with open({path!r}, "a") as file:
        file.write(json.dumps(what) + "\\n")
def init(**kwargs):
    if kwargs["project"] == "broken":
        raise RuntimeError("not logged in")
    write("init", kwargs)
def log(metrics, step=None):
    write("log", metrics, step)
    if step == 1:
        raise ConnectionError("gone")
def finish():
    write("finish")
"""


@pytest.fixture
def tracked(tmp_path, monkeypatch) -> Path:
    """A `trackio` that writes down how it was called."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(FAKE.format(path=str(tmp_path / "calls")))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(__import__("sys").modules, "trackio", raising=False)
    return tmp_path / "calls"


def test_every_epoch(tracked, plain, run):
    plain["train"]["num_epochs"] = 3
    plain["tracker"] = {"engine": "trackio", "kwargs": {"project": "p"}}
    code, folder = run(plain)
    assert code == 0
    calls: list[Any] = [json.loads(line) for line in tracked.read_text().splitlines()]
    assert [call[0] for call in calls] == ["init", "log", "log", "log", "finish"]
    assert calls[0][1]["project"] == "p" and calls[0][1]["config"]["train"]["num_epochs"] == 3
    for epoch, line in enumerate((folder / "metrics.jsonl").read_text().splitlines()):
        record = json.loads(line)
        _, metrics, step = calls[1 + epoch]
        assert step == metrics["epoch"] == epoch
        assert (metrics["train/loss"], metrics["val/acc1"]) == (record["loss"], record["val_top1"])
    assert "The tracker trackio did not take epoch 1: gone" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ({"engine": "mlflow"}, "tracker.engine must be trackio or wandb, got 'mlflow'"),
        ({"engine": "wandb"}, "tracker.engine wandb is not installed: pip install wandb, or remove tracker"),
    ],
)
def test_an_engine_that_is_not_there(tracker, message, plain, run, errors, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plain["tracker"] = tracker
    for command in ("check", "train"):
        code, folder = run(plain, command=command)
        assert code == 2 and not folder.exists()
        assert errors()[0].endswith(message)


def test_a_tracker_that_does_not_start(tracked, plain, run, errors):
    plain["tracker"] = {"engine": "trackio", "kwargs": {"project": "broken"}}
    assert run(plain)[0] == 2
    assert errors()[0].endswith("the tracker cannot be started: RuntimeError: not logged in")
