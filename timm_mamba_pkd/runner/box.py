"""torchdistill's box for a job, built after all of its stages have been tried."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchdistill.common.module_util import get_module
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.core.training import TrainingBox, get_training_box

from timm_mamba_pkd.distillation import StageWrapper
from timm_mamba_pkd.distillation.stage import STAGE_WRAPPER
from timm_mamba_pkd.models import MambaPKDEnsemble
from timm_mamba_pkd.runner.config import ConfigError, Job, first_line, stages

Box = DistillationBox | TrainingBox


def build_box(job: Job, device: torch.device) -> Box:
    """The box that trains ``job``, in its first stage.

    Every stage is set up once before, without training, so that an error in a late one costs nothing.

    Raises:
        ConfigError: torchdistill refuses a stage, a stage names a module that is not there, or a loader has no batch.
    """
    _check_schedule(job)
    logs = logging.getLogger("torchdistill")
    level = logs.level
    logs.setLevel(logging.ERROR)  # the rest it says again when it is for real
    try:
        _rehearse(job, device)
    finally:
        logs.setLevel(level)
    return _new_box(job, job.config["train"], device)


def _rehearse(job: Job, device: torch.device) -> None:
    # Only the stages: what stands beside them makes torchdistill write files between them.
    train = job.config["train"]
    rehearsed = {key: train[key] for key in train if key.startswith("stage")} or train
    box: Any = None
    for number, stage in enumerate(stages(train), start=1):
        try:
            _check_module_paths(job, stage)
            if box is None:
                box = _new_box(job, rehearsed, device)
            else:
                box.advance_to_next_stage()
        except KeyError as error:
            raise ConfigError(f"train.stage{number}: {error} is missing or unknown") from error
        except ValueError as error:
            raise ConfigError(f"train.stage{number}: {first_line(error)}") from error
        except Exception as error:
            raise ConfigError(f"train.stage{number}: {type(error).__name__}: {first_line(error)}") from error
        for name in ("train_data_loader", "val_data_loader"):
            if len(getattr(box, name)) == 0:
                raise ConfigError(f"train.stage{number}.{name} has no batch: is drop_last on and batch_size too large?")
        _check_last_batch(job, box, number)
    box.clean_modules()


def _check_last_batch(job: Job, box: Any, number: int) -> None:
    """Batch norm on a 1x1 grid, as 8x8 images end in, cannot train on a left-over batch of one image."""
    loader = box.train_data_loader
    if loader.drop_last or loader.batch_size is None or len(loader.dataset) % loader.batch_size != 1:
        return
    model = copy.deepcopy(job.student).train()
    if isinstance(model, MambaPKDEnsemble):
        model = model.first(int(model.num_active))
    try:
        with torch.no_grad():
            model(torch.zeros(1, *job.input_size, device=next(model.parameters()).device))
    except ValueError as error:
        raise ConfigError(
            f"train.stage{number}: the last batch of an epoch has one image, which the student cannot train on "
            f"({first_line(error)}): set drop_last: True or another batch_size"
        ) from error


def _check_schedule(job: Job) -> None:
    wrappers = [(stage.get("student") or {}).get("auxiliary_model_wrapper") for stage in stages(job.config["train"])]
    count = sum(wrapper is not None and wrapper.get("key") == STAGE_WRAPPER for wrapper in wrappers)
    if count == 0:
        return
    if job.teacher is None:
        raise ConfigError("a progressive schedule needs a teacher: name it under models.teacher_model")
    if isinstance(job.student, MambaPKDEnsemble) and count < len(job.student.students):
        raise ConfigError(
            f"the schedule has {count} stages, but the ensemble has {len(job.student.students)} students: "
            "give both the same list"
        )


def _new_box(job: Job, train: dict[str, Any], device: torch.device) -> Box:
    arguments = (job.datasets, train, device, None, False, 1)
    if job.teacher is None:
        return get_training_box(job.student, *arguments)
    return get_distillation_box(job.teacher, job.student, *arguments)


def _check_module_paths(job: Job, stage: dict[str, Any]) -> None:
    """Hooks, frozen modules and the like name modules by path; torchdistill ignores or chokes on a wrong one."""
    for role, model in (("teacher", job.teacher), ("student", job.student), ("model", job.student)):
        settings = stage.get(role) or {}
        wrapper = settings.get("auxiliary_model_wrapper") or {}
        if wrapper.get("key") == STAGE_WRAPPER:
            model = StageWrapper(job.student, **wrapper["kwargs"])
        elif wrapper or model is None:
            continue
        for path in _module_paths(settings):
            if not _has_module(model, path):
                shown = model.student if isinstance(model, StageWrapper) else model
                known = ", ".join(name for name, _ in shown.named_children())
                raise ValueError(f"{role}: '{path}' is no module of {type(shown).__name__}, which has {known}")


def _module_paths(settings: dict[str, Any]) -> Iterator[str]:
    hooks = settings.get("forward_hook") or {}
    for paths in (*hooks.values(), settings.get("frozen_modules"), settings.get("sequential")):
        # '+name' is a module that torchdistill adds, 'instance(Class)' any module of a class.
        yield from (path for path in paths or () if not path.startswith(("+", "instance(")))


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        return get_module(model, path) is not None
    except IndexError:
        return False
