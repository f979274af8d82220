"""What a run is made with: data and weights, versions, git state, hardware, command."""

import datetime
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from timm_mamba_pkd.models.state_dict import fingerprint
from timm_mamba_pkd.ops import BACKENDS, resolve
from timm_mamba_pkd.runner.config import Job, stage_weights
from timm_mamba_pkd.runner.streams import ReadableStream
from timm_mamba_pkd.runner.unreadable import Readable

PACKAGES = ("timm_mamba_pkd", "torch", "torchvision", "timm", "torchdistill", "numpy", "mamba-ssm", "triton")
GIT_SECONDS = 10


def describe_inputs(job: Job) -> dict[str, int | str]:
    """What ``job`` learns from besides its config: lengths of data sets, SHA-256 of weights."""
    found: dict[str, int | str] = {}
    for name, dataset in job.datasets.items():
        if isinstance(dataset, Readable | ReadableStream):
            length = len(dataset) if isinstance(dataset, Readable) else dataset.num_samples
            found[f"samples in data set '{name}'"] = length
    if job.teacher is not None:
        found["weights of the teacher"] = fingerprint(job.teacher)
    for keys, path in stage_weights(job.config["train"]):
        if path.is_file():
            found[f"weights in {'.'.join(keys)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def describe_start(device: torch.device, checkpoint: str | None, safe: bool) -> dict[str, Any]:
    """A start of a run, as run.json has it: plain data.

    Args:
        device: that trains.
        checkpoint: file name of the one it goes on from, None if it begins.
        safe: leave out the git state: for it git runs programs that the working folder's repository configures.
    """
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "checkpoint": checkpoint,
        "versions": {"python": platform.python_version(), **versions()},
        "git": None if safe else git_state(Path.cwd()),
        "hardware": hardware(device),
        "scan": next(name for name, backend in BACKENDS.items() if backend is resolve("auto", device)),
    }


def versions() -> dict[str, str | None]:
    """Of the packages that training depends on, by name; None where one is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of a working tree, and whether files that git tracks differ from it; None where git knows none."""
    try:
        git = ["git", "-c", "core.fsmonitor=false"]  # a program that the repository names
        commit, changes = (
            subprocess.run(
                [*git, *command], cwd=folder, capture_output=True, text=True, check=True, timeout=GIT_SECONDS
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def hardware(device: torch.device) -> dict[str, Any]:
    """Device, processor, cores and threads, memory in bytes, and the GPU where one trains."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_memory": gpu.total_memory, "gpus": torch.cuda.device_count()}
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
