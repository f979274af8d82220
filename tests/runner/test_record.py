"""What a run folder says of how it was made."""

import json
import logging
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from timm_mamba_pkd.runner import train as training
from timm_mamba_pkd.runner.expand import expand
from timm_mamba_pkd.runner.interrupts import Interrupted
from timm_mamba_pkd.runner.record import describe_start, git_state, hardware
from timm_mamba_pkd.runner.run_folder import RunFolder

CPU = torch.device("cpu")


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_starts_of_a_run(progressive, run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "timm_mamba_pkd", "train", "--config", "a b.yaml"])
    finish, calls = training.Trainer._finish_epoch, []

    def stop(self: Any, stage: int) -> None:
        calls.append(stage)
        if len(calls) == 2:
            raise Interrupted(signal.SIGINT)
        finish(self, stage)

    monkeypatch.setattr(training.Trainer, "_finish_epoch", stop)
    code, folder = run(progressive)
    assert code == 130
    (checkpoint,) = (folder / "checkpoints").glob("stage2*")
    assert run(progressive)[0] == 0
    first, second = record(folder)["starts"]
    assert first["command"] == "python -m timm_mamba_pkd train --config 'a b.yaml'"
    assert (first["checkpoint"], second["checkpoint"]) == (None, checkpoint.name)
    assert torch.__version__.startswith(first["versions"]["torch"].partition("+")[0])
    assert first["hardware"]["device"] == "cpu" and first["hardware"]["cores"] >= 1 and first["scan"]
    assert record(folder)["flags"]["--seed"] == 42
    assert (folder / "expanded.yaml").read_text() == expand(tmp_path / "config.yaml")
    written = yaml.load((folder / "expanded.yaml").read_text(), Loader=yaml.BaseLoader)
    assert {"stage1", "stage2"} <= set(written["train"])


def test_a_plain_config_is_not_written_out(plain, run):
    _, folder = run(plain)
    assert not (folder / "expanded.yaml").exists()


def test_git(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    git("init", "-q")
    assert git_state(tmp_path) is None  # no commit
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("commit", "-qm", "a")
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "new").write_text("untracked files do not count")
    assert git_state(tmp_path) == state
    (tmp_path / "a").write_text("b")
    assert git_state(tmp_path) == {**state, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None


def test_git_runs_no_program_of_a_strangers_repository(plain, run, tmp_path, monkeypatch):
    """Not the monitor of its files in any run, and under --safe-config no filter either."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".gitattributes").write_text("a filter=x")
    (tmp_path / "a").write_text("a")
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\ntouch "$1"\n')
    program.chmod(0o755)
    for command in ("init -q", "add a", "-c user.name=a -c user.email=a@b commit -qm a"):
        subprocess.run(["git", *command.split()], check=True)
    subprocess.run(["git", "config", "core.fsmonitor", f"{program} monitored; :"], check=True)
    subprocess.run(["git", "config", "filter.x.clean", f"{program} filtered; cat"], check=True)
    (tmp_path / "a").write_text("b")
    code, folder = run(plain, "--safe-config", output="safe")
    assert code == 0 and record(folder)["starts"][0]["git"] is None
    assert not (tmp_path / "filtered").exists() and not (tmp_path / "monitored").exists()
    code, folder = run(plain)
    assert code == 0 and record(folder)["starts"][0]["git"]["dirty"] is True
    assert (tmp_path / "filtered").exists() and not (tmp_path / "monitored").exists()
    subprocess.run(["git", "status"], check=True)
    assert (tmp_path / "monitored").exists(), "the attack is real"


def test_it_is_plain_data():
    start = describe_start(CPU, "x.pt", False)
    assert json.loads(json.dumps(start)) == start
    assert hardware(CPU)["threads"] == torch.get_num_threads()


def test_the_log_says_what_ended_a_run(plain, run, errors, monkeypatch, caplog):
    caplog.set_level(logging.INFO)

    def fail(error: BaseException) -> Path:
        def step(*args: Any) -> float:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(training.Trainer, "_step", step)
            return run(plain)[1] / "log.txt"

    log = fail(FloatingPointError("the loss became nan"))
    assert log.read_text().splitlines()[-1].endswith("ERROR\tmamba-pkd\tthe loss became nan")
    log = fail(Interrupted(signal.SIGTERM))
    assert log.read_text().splitlines()[-1].endswith("ERROR\tmamba-pkd\tEnded by SIGTERM")
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError("an error of ours"))
    assert log.read_text().splitlines()[-1] == "ZeroDivisionError: an error of ours"
    assert "Traceback" in log.read_text()


def test_lines_of_a_long_epoch(progressive, run, caplog):
    caplog.set_level(logging.INFO)
    progressive["train"]["init"]["kwargs"]["log_freq"] = 2
    assert run(progressive)[0] == 0
    lines = [message for message in caplog.messages if "  step 2/3  loss " in message]
    assert len(lines) == 2
    assert lines[0].endswith(" in the run") and " left in the stage, " in lines[0]
    assert lines[1].endswith(" left")


def test_record_is_whole(tmp_path):
    run = RunFolder(tmp_path)
    inputs: dict[str, int | str] = {"samples in data set 'a'": 1}
    run.create("a: 1\r\n", None, {"--seed": 1}, inputs)
    assert run.config.read_bytes() == b"a: 1\r\n"
    run.note_start({"time": "now"})
    run.note_destination("123")
    run.note_destination("123")
    run.note_start({"time": "later"})
    assert record(tmp_path) == {
        "flags": {"--seed": 1},
        "inputs": inputs,
        "starts": [{"time": "now"}, {"time": "later"}],
        "dst_ckpt": ["123"],
    }
