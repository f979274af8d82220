"""All that a run needs to go on as if it had never stopped, as plain data for a checkpoint."""

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from timm_mamba_pkd.distillation import Rule, StageWrapper
from timm_mamba_pkd.distributed import gather, rank, world
from timm_mamba_pkd.models import MambaPKDEnsemble
from timm_mamba_pkd.models.adaptation import adapt_to
from timm_mamba_pkd.runner.box import Box, build_box
from timm_mamba_pkd.runner.config import Job
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.random_state import RandomState
from timm_mamba_pkd.runner.step import trained_parameters

BufferCopy = tuple[nn.Module, str, torch.Tensor]
"""A module, the name of a buffer of its own, and the copy."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: the present one, from 0, over all stages.
        samples: how many of its samples have been through.
        steps, seconds: of them.
        counted, total_loss: how many of them had a finite loss, and its sum over these samples.
        trained: whether they are all; the stage's end and the validation may still be to come.
        skipped: batches of the stage with a loss that was not finite.
        best: of each stage, by number, the best validation accuracy in percent.
        metrics: the lines of metrics.jsonl.
        start: the random generators at the epoch's start.
    """

    epoch: int = 0
    samples: int = 0
    steps: int = 0
    counted: int = 0
    total_loss: float = 0.0
    seconds: float = 0.0
    trained: bool = False
    skipped: int = 0
    best: dict[int, float] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    start: RandomState | None = None

    def begin_epoch(self, epoch: int) -> None:
        """Nothing of the epoch has been trained on."""
        self.epoch = epoch
        self.samples = self.steps = self.counted = 0
        self.total_loss = self.seconds = 0.0
        self.trained, self.start = False, None


def capture(job: Job, box: Any, progress: Progress, now: RandomState) -> dict[str, Any]:
    """This process's state of a run between two steps; ``now`` is that of its random generators."""
    optimizer, scheduler = box.optimizer, box.lr_scheduler
    accumulating = box.stage_grad_count % box.grad_accum_step != 0
    return {
        "progress": dataclasses.asdict(progress),
        "random": now,
        "stage": getattr(box, "stage_number", 1),
        "stage_end_epoch": getattr(box, "stage_end_epoch", box.num_epochs),
        "num_epochs": box.num_epochs,
        "attempts": job.student.training_state.get("attempts", {}) if isinstance(job.student, MambaPKDEnsemble) else {},
        "modules": {name: _tensors(module) for name, module in _modules(job, box).items() if _changes(name, module)},
        "optimizer": optimizer.state_dict(),
        "gradients": [p.grad for p in trained_parameters(optimizer)] if accumulating else None,
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "stage_grad_count": box.stage_grad_count,
    }


def with_others(state: dict[str, Any]) -> dict[str, Any]:
    """A captured state with what rank 1, 2, ... have of their own, under ``others``."""
    return {**state, "others": gather(_own(state))[1:]}


def take_own(state: dict[str, Any]) -> bool:
    """Make a captured state that of this process, where it has one; whether there were as many processes as now.

    Otherwise those that were not there keep their random generators (None), and gradients that were accumulating are
    everyone's mean.
    """
    parts = [_own(state), *state["others"]]
    own = parts[rank()] if rank() < len(parts) else {"random": None, "start": None}
    state["random"], state["progress"]["start"] = own["random"], own["start"]
    if len(parts) == world():
        state["gradients"] = own["gradients"]
    elif state["gradients"] is not None:
        everyones = zip(*(part["gradients"] for part in parts), strict=True)
        state["gradients"] = [_mean([g for g in gradients if g is not None], len(parts)) for gradients in everyones]
    return len(parts) == world()


def _own(state: dict[str, Any]) -> dict[str, Any]:
    return {"random": state["random"], "start": state["progress"]["start"], "gradients": state["gradients"]}


def _mean(tensors: list[torch.Tensor], count: int) -> torch.Tensor | None:
    return torch.stack(tensors).sum(0) / count if tensors else None


def restore(state: dict[str, Any], job: Job, device: torch.device) -> tuple[Box, Progress]:
    """The box and the progress of a run whose state was captured; the random generators stay as they are."""
    ensemble = job.student if isinstance(job.student, MambaPKDEnsemble) else None
    if ensemble is not None:
        adapt_to(ensemble, state["modules"]["student"])
    box: Any = build_box(job, device)
    box.save_stage_ckpt = lambda *args: None  # the models have no weights yet
    while getattr(box, "stage_number", 1) < state["stage"]:
        box.current_epoch = box.stage_end_epoch
        box.advance_to_next_stage()
    del box.save_stage_ckpt
    progress = Progress(**state["progress"])
    box.current_epoch = progress.epoch
    box.stage_end_epoch, box.num_epochs = state["stage_end_epoch"], state["num_epochs"]
    if ensemble is not None and state["attempts"]:
        ensemble.training_state["attempts"] = state["attempts"]
    if isinstance(getattr(box, "student_model", None), StageWrapper):
        box.student_model.start_rule(len(box.train_data_loader.dataset))
    modules = _modules(job, box)
    for name, saved in state["modules"].items():
        _set_tensors(modules[name], saved)
    optimizer = box.optimizer
    optimizer.load_state_dict(state["optimizer"])
    if state["gradients"] is not None:
        for parameter, gradient in zip(trained_parameters(optimizer), state["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
    if box.lr_scheduler is not None:
        box.lr_scheduler.load_state_dict(state["scheduler"])
        # The optimizer's steps before the scheduler's were in another process.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    box.stage_grad_count = state["stage_grad_count"]
    return box, progress


def tensors(job: Job, box: Any) -> list[torch.Tensor]:
    """All parameters and buffers that training may change."""
    modules = [module for name, module in _modules(job, box).items() if _changes(name, module)]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def copy_buffers(job: Job, box: Any) -> list[BufferCopy]:
    """Copies of what a forward pass may change, batch norms' statistics above all, for `put_back`.

    A rule's buffers are left out: they change after a stage only, and may be as large as the training set.
    """
    modules = [module for name, module in _modules(job, box).items() if _changes(name, module)]
    parts = dict.fromkeys(part for module in modules for part in module.modules() if not isinstance(part, Rule))
    return [(part, name, buffer.clone()) for part in parts for name, buffer in part.named_buffers(recurse=False)]


@torch.no_grad()
def put_back(copies: list[BufferCopy]) -> None:
    """Undo what has happened to the buffers since `copy_buffers`."""
    for module, name, copy in copies:
        module.get_buffer(name).copy_(copy)


def _modules(job: Job, box: Any) -> dict[str, nn.Module]:
    """Everything with parameters or buffers that training may change."""
    modules: dict[str, nn.Module] = {"student": job.student, "criterion": box.criterion}
    for name in ("teacher_model", "student_model", "model"):
        if hasattr(box, name):
            modules[name] = getattr(box, name)
    for name, (loss, _) in getattr(box.criterion, "term_dict", {}).items():
        if isinstance(loss, nn.Module):  # torchdistill keeps them in a plain dictionary
            modules[f"loss {name}"] = loss
    return modules


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers; a state dict may leave some out, such as the taps of `ResNetTaps`."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _set_tensors(module: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    own = _tensors(module)
    if own.keys() != saved.keys():
        different = ", ".join(sorted(own.keys() ^ saved.keys())[:3])
        raise ConfigError(f"the checkpoint is of another version of the models ({different}): start anew with --fresh")
    for name, tensor in saved.items():
        own[name].data = tensor.to(own[name].device)


def _changes(name: str, module: nn.Module) -> bool:
    """Whether training changes a module; in torchdistill's hands even a frozen teacher, by its batch norms."""
    if name != "teacher_model":
        return True
    return module.training or any(parameter.requires_grad for parameter in module.parameters())
