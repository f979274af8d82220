"""The disk space that a run takes."""

import shutil
from collections import Counter
from pathlib import Path

from timm_mamba_pkd.models import MambaPKDEnsemble
from timm_mamba_pkd.runner.check import StageEstimate
from timm_mamba_pkd.runner.config import Job
from timm_mamba_pkd.runner.errors import ConfigError


def run_bytes(job: Job, estimates: list[StageEstimate], averages: bool = False) -> int:
    """The most that weights and checkpoints of a run take on disk: the last two, one being written, the best of each
    stage. ``averages`` are those of the weights, which belong to a checkpoint."""
    model = sum(tensor.numel() * tensor.element_size() for tensor in job.student.state_dict().values())
    weights = model * (1 + isinstance(job.student, MambaPKDEnsemble) + (job.destination is not None))
    checkpoints = [stage.checkpoint_bytes + averages * stage.trained_bytes for stage in estimates]
    return weights + 3 * max(checkpoints, default=0) + sum(checkpoints)


def require_space(
    job: Job, folder: Path, estimates: list[StageEstimate], averages: bool = False, resuming: bool = False
) -> tuple[int, int]:
    """Bytes that a run in ``folder`` writes there and into its caches; what a run to resume has there is not asked for.

    Raises:
        ConfigError: they do not fit the disks.
    """
    cached = sum(stage.cache_bytes for stage in estimates)
    written = run_bytes(job, estimates, averages)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if resuming else 0
    cached = 0 if resuming else cached  # a cache asks for what it lacks
    wanted = Counter({folder: max(written - there, 0)})
    for stage in estimates if not resuming else ():
        wanted[folder if stage.cache_dir is None else Path(stage.cache_dir)] += stage.cache_bytes
    disks: dict[int, tuple[Path, int]] = {}
    for path, number in wanted.items():
        path = path.expanduser().absolute()
        existing = next(part for part in (path, *path.parents) if part.exists())
        device = existing.stat().st_dev
        disks[device] = existing, number + disks.get(device, (existing, 0))[1]
    for existing, needed in disks.values():
        free = shutil.disk_usage(existing).free
        if needed > free:
            cache = f", {size(cached)} of them for cached logits (fewer num_views take less)" if cached else ""
            message = f"the run needs about {size(needed)}{cache}, but only {size(free)} are free in {existing}"
            with job.source.locating():
                raise ConfigError(message, at=("train", "views", "num_views") if cached else ("train",))
    return written, cached


def size(number: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
