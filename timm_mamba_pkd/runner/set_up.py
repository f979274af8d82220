"""What the commands that take a config begin with: device, folder, seed, and the job."""

import argparse
import ctypes
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torchdistill.common.main_util import set_seed
from torchdistill.misc.log import set_basic_log_config

from timm_mamba_pkd import distributed
from timm_mamba_pkd.runner.config import Job, prepare
from timm_mamba_pkd.runner.device import find_device, precision, precision_of_config, slows_down
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.run_folder import RunFolder
from timm_mamba_pkd.runner.safe_config import Folders

logger = logging.getLogger(__name__)


def set_up(args: argparse.Namespace, device: torch.device) -> tuple[Job, torch.dtype | None]:
    """Seed, the job of the config, and the dtype of its automatic mixed precision."""
    with distributed.failing_together(ConfigError):
        log = getattr(args, "run_log", None)
        if log is not None and Path(log).expanduser().is_dir():
            raise ConfigError(f"--run_log {log} is a directory: name a file")
    set_basic_log_config()
    # It logs every object that a YAML file builds.
    logging.getLogger("torchdistill.common.main_util").setLevel(logging.WARNING)
    _keep_freed_memory()
    torch.backends.cudnn.benchmark = not args.disable_cudnn_benchmark
    job: Any = None
    for first in (True, False):  # of a machine's processes, which may have data to download
        with distributed.failing_together(ConfigError):
            if first == (distributed.local_rank() == 0):
                set_seed(args.seed)
                job = prepare(args.config, device, args.cache_dir, safe_folders(args))
    for warning in job.warnings if distributed.is_main() else ():
        logger.warning(warning)
    if distributed.rank() > 0:
        set_seed((args.seed + distributed.rank()) % 2**32)  # the models are the same; dropout and augmentations differ
    if args.channels_last:
        for model in (job.teacher, job.student):
            if model is not None:
                model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    amp: torch.dtype | None = None
    with distributed.failing_together(ConfigError):
        with job.source.locating():
            by_config = precision_of_config(job.config["train"].get("amp"))
        amp = precision(args.amp, args.amp_dtype, by_config)
    if slows_down(amp, device) and distributed.is_main():
        asked, name = "amp in the config" if by_config else "--amp", str(amp).removeprefix("torch.")
        logger.warning(f"this CPU has no instructions for {name}: float32 is likely faster, without {asked}")
    return job, amp


def _keep_freed_memory() -> None:
    """Have glibc keep what PyTorch frees on the CPU, which every step needs again: new pages cost several percent."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def run_folder(args: argparse.Namespace) -> RunFolder:
    """The folder of ``--output``, or that of the config's name under runs."""
    return RunFolder(args.output or Path("runs") / Path(args.config).stem)


def device_of(args: argparse.Namespace) -> torch.device:
    """The device of the flags; of several processes on a machine each has a GPU of its own."""
    device = find_device(args.device)
    if device.type != "cuda" or not distributed.launched():
        return device
    return find_device(f"cuda:{distributed.local_rank()}")


def safe_folders(args: argparse.Namespace) -> Folders | None:
    """Where a run with ``--safe-config`` may write; None without the flag."""
    cache = None if args.cache_dir is None else Path(args.cache_dir)
    return Folders(run_folder(args).path, cache) if args.safe_config else None
