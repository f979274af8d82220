"""torchdistill's experiment tracker: ``tracker: {engine: trackio or wandb, kwargs: {...}}`` in a config."""

import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchdistill.misc.log import TrainingTracker, setup_tracker

from timm_mamba_pkd.distributed import failing_together, is_main
from timm_mamba_pkd.runner.config import Job
from timm_mamba_pkd.runner.errors import ConfigError, explain

logger = logging.getLogger(__name__)

NAMES = {"loss": "train/loss", "lr": "train/lr", "val_top1": "val/acc1", "val_top1_student": "val/acc1_student"}


class Tracker:
    """A run's tracker, or none where the config names none."""

    def __init__(self, tracker: TrainingTracker | None) -> None:
        self.tracker = tracker

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of an epoch's line of metrics.jsonl, under torchdistill's names, with the epoch as step."""
        if self.tracker is None:
            return
        numbers = {NAMES.get(name, name): value for name, value in record.items() if isinstance(value, int | float)}
        try:
            self.tracker.log(numbers, step=record["epoch"])
        except Exception as error:  # a service that is away does not end a run
            logger.warning("The tracker %s did not take epoch %d: %s", self.tracker.engine, record["epoch"], error)


def require_tracker(job: Job) -> None:
    """Raise a ConfigError if the config names a tracker that is unknown or not installed."""
    engine = (job.config.get("tracker") or {}).get("engine")
    if engine is None:
        return
    at = ("tracker", "engine")
    if engine not in TrainingTracker.SUPPORTED_ENGINES:
        known = " or ".join(TrainingTracker.SUPPORTED_ENGINES)
        raise ConfigError(f"tracker.engine must be {known}, got {engine!r}", at=at)
    if importlib.util.find_spec(engine) is None:
        raise ConfigError(f"tracker.engine {engine} is not installed: pip install {engine}, or remove tracker", at=at)


@contextmanager
def tracking(job: Job, folder: Path) -> Iterator[Tracker]:
    """The tracker of a config, which is finished when the context ends; rank 0 alone has it.

    wandb's own files go to ``folder``, unless its ``dir`` or WANDB_DIR names another.

    Raises:
        ConfigError: it cannot be started.
    """
    shown = {name: job.config[name] for name in ("models", "train", "test")}  # data sets are objects, not text
    chosen = job.config.get("tracker")
    if chosen and chosen.get("engine") == "wandb" and "WANDB_DIR" not in os.environ:
        chosen = {**chosen, "kwargs": {"dir": str(folder), **(chosen.get("kwargs") or {})}}
    tracker: TrainingTracker | None = None
    with failing_together(ConfigError), job.source.locating():
        try:
            if is_main():
                tracker = setup_tracker(chosen, json.loads(json.dumps(shown, default=str)))
        except Exception as error:
            raise ConfigError(f"the tracker cannot be started: {explain(error)}", at=("tracker",)) from error
    try:
        yield Tracker(tracker)
    finally:
        if tracker is not None:
            try:
                tracker.finish()
            except Exception as error:
                logger.warning("The tracker %s did not finish: %s", tracker.engine, error)
