"""Runs of `mamba-pkd train` that a benchmark compares."""

import subprocess
import sys
from pathlib import Path


def train(config: str, folder: Path, flags: list[str]) -> None:
    """One run into ``folder``, its config and log beside it; one that fails ends the program with its last line.

    `train` goes on where a run was stopped, repeats none that is finished, and refuses a folder of another config.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(config)
    command = [sys.executable, "-m", "timm_mamba_pkd", "train", "--config", str(path), "--output", str(folder), *flags]
    with folder.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the run as well, which saves before it ends
            process.wait()
            sys.exit(f"interrupted; the same command goes on (the run's log: {log.name})")
        log.seek(0)
        if code:
            said = log.read().splitlines() or [f"train ended with exit code {code}"]
            sys.exit(f"{said[-1]}\n(the end of {log.name})")
