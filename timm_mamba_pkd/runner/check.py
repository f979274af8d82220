"""``mamba-pkd check``, and what ``train`` does first: every stage is tried with one batch; nothing is left of it."""

import copy
import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchdistill.common.module_util import get_module

from timm_mamba_pkd.distillation import StageWrapper
from timm_mamba_pkd.distillation.stage import CACHED_TEACHER, STAGE_WRAPPER
from timm_mamba_pkd.distributed import world
from timm_mamba_pkd.models import MambaPKDEnsemble
from timm_mamba_pkd.runner.batches import Batches
from timm_mamba_pkd.runner.box import build_box
from timm_mamba_pkd.runner.config import Job, local_file, require_known_labels, stages
from timm_mamba_pkd.runner.destination import require_separate
from timm_mamba_pkd.runner.device import autocast, keep_logits_in_float32
from timm_mamba_pkd.runner.errors import ConfigError, explain, first_line, ignored_parameter, no_parameter, parameters
from timm_mamba_pkd.runner.random_state import random_state, set_random_state
from timm_mamba_pkd.runner.step import require_our_step, trained_parameters
from timm_mamba_pkd.runner.streams import unshuffled
from timm_mamba_pkd.runner.tracking import require_tracker
from timm_mamba_pkd.runner.training_state import Progress, capture, copy_buffers, put_back

logger = logging.getLogger(__name__)

SLOW = 2.0
"""Seconds after which a first step is not repeated for a better measurement."""


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a run: its student (of a progressive schedule), its length, and what it will take, roughly.

    ``checkpoint_bytes`` is the size of a checkpoint, ``trained_bytes`` that of the parameters in training.
    """

    student: str | None
    epochs: int
    steps: int
    seconds_per_step: float
    cache_bytes: int
    cache_dir: str | None
    checkpoint_bytes: int = 0
    trained_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Of the training steps, without data loading, validation and test."""
        return self.epochs * self.steps * self.seconds_per_step


def check(
    job: Job,
    device: torch.device,
    amp: torch.dtype | None = None,
    sync_bn: bool = False,
    skips_nonfinite: bool = False,
) -> list[StageEstimate]:
    """Try every stage of ``job`` with one batch, through teacher, student, loss and backward pass.

    It works on copies and puts the random number generators back: a run is the same with and without it. With
    ``sync_bn`` the student's batch norms will see the batches of all processes; with ``skips_nonfinite`` a loss that is
    not finite is a warning, as training passes over the batch.

    Raises:
        ConfigError: torchdistill refuses a stage, a stage names a module or a file that is not there, a loss a
            parameter that it does not read or a path that no hook records, a loader has no batch, ...
    """
    with job.source.locating():
        require_tracker(job)
    logs = logging.getLogger("torchdistill")
    level = logs.level
    logs.setLevel(logging.ERROR)  # the rest it says again when it is for real
    try:
        with job.source.locating(), _same_random_numbers():
            require_separate(job)
            _check_schedule(job)
            return list(_try_stages(_copy(job, amp), device, amp, sync_bn, skips_nonfinite))
    finally:
        logs.setLevel(level)


def _copy(job: Job, amp: torch.dtype | None) -> Job:
    """The job with its own models and ``train`` section, and of that only the stages: the rest writes files."""
    train = job.config["train"]
    train = {key: train[key] for key in train if key.startswith("stage")} or train
    teacher, student, train = copy.deepcopy((job.teacher, job.student, train))
    trial = dataclasses.replace(job, teacher=teacher, student=student, config={**job.config, "train": train})
    if amp is not None:
        keep_logits_in_float32(teacher, student)
    return trial


def _try_stages(
    job: Job, device: torch.device, amp: torch.dtype | None, sync_bn: bool, skips_nonfinite: bool
) -> Iterator[StageEstimate]:
    box: Any = None
    for number, stage in enumerate(stages(job.config["train"]), start=1):
        name = f"stage{number}"
        at = ("train", name)
        with _explaining(name):
            _check_files(stage)
            _check_module_paths(job, stage)
            if box is None:
                box = build_box(job, device)
                box.rehearsing = True  # no caches are opened
            else:
                box.current_epoch = box.stage_end_epoch
                box.advance_to_next_stage()
        require_our_step(box, amp, name)
        _check_ignored(box, stage, name)
        _check_shares(box, name)
        steps = len(Batches(box.train_data_loader))
        for loader in ("train_data_loader", "val_data_loader"):
            if len(getattr(box, loader)) == 0 or (loader == "train_data_loader" and steps == 0):
                times = f", times {world()} processes" if world() > 1 else ""
                message = f"train.{name}.{loader} has no batch: is drop_last on and batch_size{times} too large?"
                raise ConfigError(message, at=(*at, loader))
        with _explaining(name):
            box.pre_epoch_process(epoch=getattr(box, "current_epoch", 0))
        batch = _first_batch(box.train_data_loader, name)
        buffers = copy_buffers(job, box) if skips_nonfinite else []
        seconds, loss = _try_step(job, box, batch, device, amp, name)
        if not np.isfinite(loss):
            message = f"train.{name}: the loss of the first batch is {loss}"
            if not skips_nonfinite:
                raise ConfigError(message, at=(*at, "criterion"))
            logger.warning("%s: such batches are skipped", message)
        elif seconds < SLOW:
            seconds, _ = _try_step(job, box, batch, device, amp, name)
        _check_last_batch(box, name, device, sync_bn)
        put_back(buffers)
        _check_scheduler(box, stage, name, steps)
        wrapper = getattr(box, "student_model", None)
        yield StageEstimate(
            student=wrapper.ensemble.names[wrapper.position] if isinstance(wrapper, StageWrapper) else None,
            epochs=stage["num_epochs"],
            steps=steps,
            seconds_per_step=seconds,
            cache_bytes=getattr(wrapper, "cache_bytes", 0),
            cache_dir=wrapper.cache_dir if isinstance(wrapper, StageWrapper) else None,
            **_checkpoint_sizes(job, box),
        )
    box.clean_modules()


def _checkpoint_sizes(job: Job, box: Any) -> dict[str, int]:
    """Of a checkpoint of the stage, with two numbers of the optimizer for each trained one, as AdamW has them."""
    trained = sum(parameter.numel() * parameter.element_size() for parameter in trained_parameters(box.optimizer))
    state = _tensor_bytes(capture(job, box, Progress(), random_state()))
    accumulated = trained if box.grad_accum_step > 1 else 0
    return {"checkpoint_bytes": state + 2 * trained + accumulated, "trained_bytes": trained}


def _tensor_bytes(state: Any) -> int:
    """Of the tensors in nested data; what shares memory counts once, as in a torch file."""
    found: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = max(found.get(value.data_ptr(), 0), value.numel() * value.element_size())
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                walk(part)

    walk(state)
    return sum(found.values())


@contextmanager
def _explaining(stage: str) -> Iterator[None]:
    """Whatever fails in this context is a ConfigError about a stage."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"train.{stage}: {explain(error)}", at=("train", stage)) from error


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """After this context, random numbers go on as if it had not been."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def _first_batch(loader: DataLoader, stage: str) -> Any:
    """A batch as the loader gives it, without its worker processes."""
    dataset: Any = loader.dataset
    how: dict[str, Any] = {"batch_sampler": loader.batch_sampler}
    if isinstance(dataset, IterableDataset):
        dataset, how = unshuffled(dataset), {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    elif loader.batch_sampler is None:
        how = {"batch_size": None, "sampler": loader.sampler}
    try:
        images, targets, supp_dict = next(iter(DataLoader(dataset, collate_fn=loader.collate_fn, **how)))
    except Exception as error:
        where = f"train.{stage}.train_data_loader"
        raise ConfigError(
            f"{where}: a batch cannot be read: {explain(error)}", at=("train", stage, "train_data_loader")
        ) from error
    return images, targets, supp_dict


def _try_step(
    job: Job, box: Any, batch: Any, device: torch.device, amp: torch.dtype | None, stage: str
) -> tuple[float, float]:
    """Forward, loss and backward of one batch, without a step of the optimizer; the seconds it took, and the loss."""
    images, targets, supp_dict = batch
    criterion = ("train", stage, "criterion")
    try:
        require_known_labels(targets, job.num_classes)
    except ConfigError as error:
        error.at = ("models", job.student_role)
        raise
    if targets.is_floating_point() and targets.shape[1:] != (job.num_classes,):
        message = f"train.{stage}: views mix labels of {targets.shape[-1]} classes, the models have {job.num_classes}"
        raise ConfigError(message, at=("train", stage, "train_data_loader"))
    started = time.perf_counter()
    try:
        with autocast(device, amp):
            loss = box.forward_process(images.to(device), targets.to(device), supp_dict)
    except KeyError as error:
        message = f"train.{stage}: a loss reads {error}, which no forward_hook of this stage records{_recorded(box)}"
        raise ConfigError(message, at=criterion) from error
    except Exception as error:
        raise ConfigError(f"train.{stage}: a training step fails: {explain(error)}", at=("train", stage)) from error
    if not isinstance(loss, torch.Tensor):
        raise ConfigError(f"train.{stage}: criterion has no sub_terms: there is nothing to learn", at=criterion)
    if loss.numel() != 1:
        raise ConfigError(f"train.{stage}: the loss has shape {tuple(loss.shape)} instead of one number", at=criterion)
    if not loss.requires_grad:
        raise ConfigError(f"train.{stage}: the loss depends on nothing that is trained", at=criterion)
    loss.backward()
    value = loss.item()  # waits for the device
    seconds = time.perf_counter() - started
    box.optimizer.zero_grad()
    return seconds, value


def _recorded(box: Any) -> str:
    """The paths that losses can read."""
    roles = {"student": "student_io_dict", "teacher": "teacher_io_dict", "model": "model_io_dict"}
    paths = {role: sorted({".", *getattr(box, name)}) for role, name in roles.items() if hasattr(box, name)}
    return "".join(f"; {role}: {', '.join(names)}" for role, names in paths.items())


def _check_ignored(box: Any, stage: dict[str, Any], name: str) -> None:
    """torchdistill's losses and wrappers take any keyword argument and pass over those that they do not know."""
    at = ("train", name)
    built: list[tuple[Any, dict[str, Any], tuple[str, ...]]] = []
    for role, attribute in (("teacher", "teacher_model"), ("student", "student_model"), ("model", "model")):
        wrapper = (stage.get(role) or {}).get("auxiliary_model_wrapper") or {}
        built.append((getattr(box, attribute, None), wrapper, (*at, role, "auxiliary_model_wrapper")))
    terms = (stage["criterion"].get("kwargs") or {}).get("sub_terms") or {}
    for term, (loss, _) in getattr(box.criterion, "term_dict", {}).items():
        loss = getattr(loss, "low_level_loss", loss)
        if isinstance(terms[term]["criterion"], dict):
            built.append((loss, terms[term]["criterion"], (*at, "criterion", "kwargs", "sub_terms", term)))
    for part, config, place in built:
        if isinstance(part, nn.Module) and config.get("kwargs"):
            ignored = ignored_parameter(type(part), config["kwargs"])
            if ignored is not None:
                message = no_parameter(config["key"], ignored, parameters(type(part)))
                raise ConfigError(f"train.{name}: {message}", at=place)


def _check_last_batch(box: Any, stage: str, device: torch.device, sync_bn: bool) -> None:
    """Batch norm on a 1x1 grid, as 8x8 images end in, cannot train on a left-over batch of one image."""
    loader = box.train_data_loader
    if isinstance(loader.dataset, IterableDataset) or loader.drop_last or loader.batch_size is None:
        return
    if not 1 <= len(loader.dataset) % (loader.batch_size * world()) < 2 * (1 if sync_bn else world()):
        return
    images, targets, supp_dict = next(
        iter(DataLoader(loader.dataset, batch_sampler=[[0]], collate_fn=loader.collate_fn))
    )
    try:
        box.forward_process(images.to(device), targets.to(device), supp_dict)
    except Exception as error:
        raise ConfigError(
            f"train.{stage}: the last batch of an epoch has one image{' in a process' if world() > 1 else ''}, which "
            f"cannot be trained on ({first_line(error)}): set drop_last: True or another batch_size",
            at=("train", stage, "train_data_loader", "kwargs"),
        ) from error


def _check_shares(box: Any, name: str) -> None:
    """What several processes cannot share."""
    loader = box.train_data_loader
    if world() > 1 and loader.batch_sampler is None:
        message = f"train.{name}.train_data_loader has no batch_size: several processes cannot share it"
        raise ConfigError(message, at=("train", name, "train_data_loader"))


def _check_scheduler(box: Any, stage: dict[str, Any], name: str, steps_of_epoch: int) -> None:
    """Schedulers use their arguments only as they step: here all steps of the stage, up to a thousand."""
    scheduler, every = box.lr_scheduler, box.scheduling_step
    if scheduler is None:
        return
    steps = stage["num_epochs"]
    if every > 0:  # the count of batches goes on from epoch to epoch, and only a step of the optimizer's looks at it
        steps = steps * steps_of_epoch // math.lcm(every, box.grad_accum_step)
    total = getattr(scheduler, "total_steps", None)
    at = ("train", name, "scheduler")
    if total is not None and steps > total:
        message = f"train.{name}: the scheduler is made for {total} steps, but the stage takes {steps}"
        raise ConfigError(message, at=at)
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    if plateau and every > 0:
        message = f"train.{name}: ReduceLROnPlateau steps on the validation's accuracy: remove scheduling_step"
        raise ConfigError(message, at=at)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer does not step
            for _ in range(min(steps, 1000)):
                scheduler.step(*[1.0] * plateau)
    except Exception as error:
        message = f"train.{name}: scheduler {type(scheduler).__name__} fails as it steps: {explain(error)}"
        raise ConfigError(message, at=at) from error


def _check_schedule(job: Job) -> None:
    wrappers = [(stage.get("student") or {}).get("auxiliary_model_wrapper") for stage in stages(job.config["train"])]
    count = sum(wrapper is not None and wrapper.get("key") == STAGE_WRAPPER for wrapper in wrappers)
    if count == 0:
        return
    if job.teacher is None:
        raise ConfigError("a progressive schedule needs a teacher: name it under models.teacher_model", at=("models",))
    if isinstance(job.student, MambaPKDEnsemble) and count < len(job.student.students):
        raise ConfigError(
            f"the schedule has {count} stages, but the ensemble has {len(job.student.students)} students: "
            "give both the same list",
            at=("train", "students"),
        )


def _check_files(stage: dict[str, Any]) -> None:
    """torchdistill trains on without weights that it does not find."""
    for role in ("teacher", "student", "model"):
        path = local_file((stage.get(role) or {}).get("src_ckpt"))
        if path is not None and not path.is_file():
            raise ValueError(f"{role}: weights file {path} does not exist")


def _check_module_paths(job: Job, stage: dict[str, Any]) -> None:
    """Hooks, frozen modules and the like name modules by path; torchdistill ignores or chokes on a wrong one."""
    for role, model in (("teacher", job.teacher), ("student", job.student), ("model", job.student)):
        settings = stage.get(role) or {}
        wrapper = settings.get("auxiliary_model_wrapper") or {}
        if wrapper.get("key") == STAGE_WRAPPER:
            model = StageWrapper(job.student, **wrapper["kwargs"])
        elif model is None or wrapper.get("key") not in (None, CACHED_TEACHER):
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
