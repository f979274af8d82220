"""Runs that are killed, interrupted and damaged. `make faults` tries many more moments than this short form."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from timm_mamba_pkd.runner.checkpoints import Checkpoints

ROOT = Path(__file__).resolve().parents[2]
LONG = os.environ.get("FAULTS") == "long"
PHASES = [
    "training", "caching", "saving", "finishing", "validating", "writing weights", "keeping the best",
    "switching stages", "testing", "reporting",
]  # fmt: skip
RunForked = Callable[..., tuple[int, float | None, str]]

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]


@pytest.fixture
def run_forked(zygote, tmp_path) -> RunForked:
    """Run ``train`` in a folder, with a fault: (exit code, seconds from the fault to the end or None, output)."""

    def run_forked(config: Path, folder: Path, fault: dict[str, Any] | None = None) -> tuple[int, float | None, str]:
        folder.mkdir(exist_ok=True)
        output, moment = folder / "output.txt", folder / "moment"
        output.unlink(missing_ok=True)
        moment.unlink(missing_ok=True)
        argv = ["train", "--config", str(config), "--device", "cpu", "--output", "run"]
        fault = None if fault is None else {"moment": str(moment), **fault}
        command = {"argv": argv, "cwd": str(folder), "output": str(output), "fault": fault}
        zygote.stdin.write(json.dumps(command) + "\n")
        zygote.stdin.flush()
        answer = json.loads(zygote.stdout.readline())
        return answer["codes"][0], answer["seconds"], output.read_text()

    return run_forked


@pytest.fixture
def whole(rich, write, run_forked, tmp_path) -> tuple[Path, Path]:
    """A config, and the folder of its run when nothing stops it."""
    config = write(rich)
    code, _, output = run_forked(config, tmp_path / "whole")
    assert code == 0, output
    return config, tmp_path / "whole" / "run"


def moments(seed: int, repeats: int) -> list[tuple[str, int, float]]:
    """(phase, which of its times, seconds after its beginning), each phase equally often."""
    rng = random.Random(seed)
    times = {"switching stages": 1, "testing": 1, "reporting": 1}  # how often a phase comes, where it is not 4
    return [
        (phase, rng.randint(1, times.get(phase, 4)), rng.choice([0, rng.random() / 50]))
        for phase in PHASES
        for _ in range(repeats)
    ]


def test_killed_at_random_moments(whole, run_forked, tmp_path, assert_same_run):
    config, expected = whole
    killed = []
    for number, (phase, n, delay) in enumerate(moments(seed=1, repeats=6 if LONG else 1)):
        folder = tmp_path / f"killed{number}"
        fault = {"phase": phase, "n": n, "delay": delay, "number": signal.SIGKILL}
        code, _, output = run_forked(config, folder, fault)
        assert code in (-signal.SIGKILL, 0), output  # 0: the phase does not come so often
        killed += [phase] * (code != 0)
        code, _, output = run_forked(config, folder)
        assert code == 0, output
        assert_same_run(expected, folder / "run")
    assert len(killed) >= (50 if LONG else 8), killed


def test_signals_in_every_phase(whole, run_forked, tmp_path, assert_same_run):
    config, expected = whole
    for number, phase in enumerate(["checking", *PHASES]):
        folder = tmp_path / f"ended{number}"
        kind = signal.SIGINT if number % 2 else signal.SIGTERM
        fault = {"phase": phase, "n": 1, "delay": 0.001 if LONG else 0, "number": kind}
        code, seconds, output = run_forked(config, folder, fault)
        assert code == 128 + kind, output
        assert seconds is not None and seconds < 30
        assert f"mamba-pkd: ended by {kind.name}; the same command goes on from there" in output
        assert "Traceback" not in output
        if phase == "checking":
            assert not (folder / "run").exists()
        if LONG or phase in ("training", "validating", "switching stages"):
            code, _, output = run_forked(config, folder)
            assert code == 0, output
            assert_same_run(expected, folder / "run")


def test_killed_while_saving(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    rng = random.Random(3)
    for trial in range(100 if LONG else 10):
        child = os.fork()
        if child == 0:
            number = trial * 1_000_000
            while True:
                number += 1
                content = torch.full((100_000,), number)
                path = checkpoints.save({"number": number, "content": content}, 1, 1, number)
                checkpoints.keep_best(path, 1)
        while checkpoints.last() is None:
            time.sleep(0.001)
        time.sleep(rng.random() / 10)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = checkpoints.load()
        assert state is not None and (state["content"] == state["number"]).all()
        assert not list(tmp_path.glob("*.damaged"))


def test_a_second_signal_ends_at_once():
    script = (
        "import os, signal, sys, time\n"
        "from timm_mamba_pkd.runner import interrupts\n"
        "with interrupts.ending_on_signals(), interrupts.deferring():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "    time.sleep(60)\n"
    )
    for kind in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        ) as process:  # fmt: skip
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(kind)
            assert process.stderr.readline() == "\n"
            assert f"{kind.name}: finishing the step and saving" in process.stderr.readline()
            process.send_signal(kind)
            assert process.wait(10) == -kind
