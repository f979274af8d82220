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
    raise ConnectionError("gone")
"""


@pytest.fixture
def tracked(tmp_path, monkeypatch) -> Path:
    """A `trackio` and a `wandb` that write down how they were called."""
    (tmp_path / "packages").mkdir()
    for engine in ("trackio", "wandb"):
        (tmp_path / "packages" / f"{engine}.py").write_text(FAKE.format(path=str(tmp_path / "calls")))
        monkeypatch.delitem(__import__("sys").modules, engine, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")
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
    log = (folder / "log.txt").read_text()
    assert "The tracker trackio did not take epoch 1: gone" in log and "trackio did not finish: gone" in log


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


@pytest.mark.parametrize(("given", "used"), [({}, "run"), ({"dir": "other"}, "other")])
def test_wandb_writes_into_the_run(tracked, plain, run, tmp_path, monkeypatch, given, used):
    monkeypatch.delenv("WANDB_DIR", raising=False)
    plain["tracker"] = {"engine": "wandb", "kwargs": {"project": "p", **given}}
    assert run(plain)[0] == 0
    start = json.loads(tracked.read_text().splitlines()[0])[1]
    assert start["dir"] == (str(tmp_path / used) if used == "run" else used) and start["project"] == "p"
