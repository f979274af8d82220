"""What follows a loss: the backward pass and, once per accumulation, the steps of optimizer and scheduler."""

from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torchdistill.core.interfaces.post_forward_proc import default_post_forward_process

from timm_mamba_pkd.distributed import average_gradients, world
from timm_mamba_pkd.runner.errors import ConfigError


class Step:
    """torchdistill's `default_post_forward_process`, with the mean of all processes' gradients.

    A config with another ``post_forward_process`` keeps its own.
    """

    def __call__(self, box: Any, loss: Tensor) -> None:
        """Backward, and the steps that are due in ``box``."""
        if not takes_our_step(box):
            box.post_forward_process(loss=loss)
            return
        box.stage_grad_count += 1
        (loss / box.grad_accum_step).backward()
        if box.stage_grad_count % box.grad_accum_step != 0:
            return
        self._step_optimizer(box)
        scheduler, every = box.lr_scheduler, box.scheduling_step
        if scheduler is not None and every > 0 and box.stage_grad_count % every == 0:
            restarts = isinstance(scheduler, CosineAnnealingWarmRestarts)
            scheduler.step(*[box.stage_grad_count // every] * restarts)

    def _step_optimizer(self, box: Any) -> None:
        parameters = [parameter for group in box.optimizer.param_groups for parameter in group["params"]]
        average_gradients(parameters)
        if box.max_grad_norm is not None:
            clip_grad_norm_(parameters, box.max_grad_norm)
        box.optimizer.step()
        box.optimizer.zero_grad()


def takes_our_step(box: Any) -> bool:
    """Whether the stage of ``box`` names no ``post_forward_process`` of its own."""
    return type(box).post_forward_process is default_post_forward_process


def require_our_step(box: Any, stage: str) -> None:
    """Raise a ConfigError if ``stage`` has a ``post_forward_process`` of its own, which knows one process only."""
    if world() > 1 and not takes_our_step(box):
        raise ConfigError(
            f"train.{stage}.post_forward_process takes the optimizer's step itself, and several processes need the "
            "mean of their gradients there: remove it, or train in one process",
            at=("train", stage, "post_forward_process"),
        )
