"""Bad folders, devices and flags: one line on stderr, exit code 2, and nothing is overwritten."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

from timm_mamba_pkd.cli import main

ROOT = Path(__file__).resolve().parents[2]


def error_of(capsys) -> str:
    """The one line that the command left on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mamba-pkd: error: ")
    return line.removeprefix("mamba-pkd: error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(plain, run, capsys):
    assert run(plain, "--device", "cuda")[0] == 2
    assert error_of(capsys).startswith("device cuda cannot be used: ")


def test_bad_devices(plain, run, capsys):
    for device in ("gpu", "cuda:99"):
        assert run(plain, "--device", device)[0] == 2
        assert error_of(capsys).startswith(f"device {device} cannot be used: ")


def test_several_processes(plain, run, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(plain)[0] == 2
    assert "several processes is not supported yet" in error_of(capsys)


def test_folders_that_cannot_be_written(plain, run, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert run(plain, output="file/run")[0] == 2
    assert error_of(capsys) == f"folder {tmp_path}/file/run cannot be written: Not a directory"
    plain["models"]["model"]["dst_ckpt"] = str(tmp_path / "file" / "model.pt")
    code, folder = run(plain)
    assert code == 2 and not folder.exists()
    assert error_of(capsys).startswith(f"folder {tmp_path}/file cannot be written: ")


def test_loss_that_becomes_infinite(plain, run, capsys):
    plain["train"]["optimizer"] = {"key": "SGD", "kwargs": {"lr": 1.0e30}}
    code, folder = run(plain)
    assert code == 2
    assert error_of(capsys) == "the loss became nan at epoch 1, step 2: lower the lr"
    assert not (folder / "weights").exists()


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_never_overwrites(plain, run, capsys, tmp_path):
    plain["models"]["model"]["dst_ckpt"] = str(tmp_path / "ckpt" / "model.pt")
    _, folder = run(plain)
    capsys.readouterr()
    before = files(folder), files(tmp_path / "ckpt")
    assert len(before[0]) >= 5 and len(before[1]) == 1

    assert run(plain)[0] == 2
    message = f"{folder} already holds a run, finished or not: choose another --output, or move it away"
    assert error_of(capsys) == message
    (folder / "config.yaml").unlink()
    assert run(plain)[0] == 2
    assert error_of(capsys) == message
    (folder / "config.yaml").write_bytes(before[0][folder / "config.yaml"])
    code, other = run(plain, output="other")
    assert code == 2 and not other.exists()
    assert error_of(capsys).startswith(f"dst_ckpt {tmp_path}/ckpt/model.pt exists already: move it away")
    assert before == (files(folder), files(tmp_path / "ckpt"))


def test_a_killed_run_is_not_overwritten(plain, run, write, capsys, tmp_path):
    plain["train"]["num_epochs"] = 100_000
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "timm_mamba_pkd", "train", "--config", str(write(plain))]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--output", str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=output, stderr=output,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 300
            while not (folder / "weights" / "model.safetensors").exists():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    timm.create_model(
        "mamba_pkd_s1", num_classes=3, in_chans=1, checkpoint_path=str(folder / "weights" / "model.safetensors")
    )
    before = files(folder)
    assert run(plain)[0] == 2
    assert "already holds a run" in error_of(capsys)
    assert files(folder) == before
    assert main(["report", str(folder)]) == 2
    assert "has not finished: test it with: mamba-pkd evaluate" in error_of(capsys)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_run_log_that_is_a_directory(command, plain, run, capsys, tmp_path):
    code, folder = run(plain, "--run_log", str(tmp_path), command=command)
    assert code == 2 and not folder.exists()
    assert error_of(capsys) == f"--run_log {tmp_path} is a directory: name a file"


def test_an_output_that_is_a_file(plain, run, capsys, tmp_path):
    output = tmp_path / "mine.txt"
    output.write_text("mine")
    assert run(plain, output="mine.txt")[0] == 2
    assert error_of(capsys) == f"--output {output} is a file: name a folder"
    assert output.read_text() == "mine"
