"""What follows a loss: the backward pass and, once per accumulation, the steps of optimizer and scheduler."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torchdistill.core.interfaces.post_forward_proc import default_post_forward_process

from timm_mamba_pkd.distributed import average_gradients, world
from timm_mamba_pkd.runner.errors import ConfigError

SMALLEST_SCALE = 1e-4  # of float16's gradients, as in fairseq


class Step:
    """torchdistill's `default_post_forward_process`, with all processes' mean gradients and a scaler for float16.

    A config with another ``post_forward_process`` keeps its own.

    Args:
        device: of the model.
        amp: dtype of the automatic mixed precision, None for none.
    """

    def __init__(self, device: torch.device, amp: torch.dtype | None) -> None:
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    def __call__(self, box: Any, loss: Tensor) -> None:
        """Backward, and the steps that are due in ``box``.

        Raises:
            FloatingPointError: float16's gradients overflow however small the loss is scaled.
        """
        if not takes_our_step(box):
            box.post_forward_process(loss=loss)
            return
        box.stage_grad_count += 1
        self.scaler.scale(loss / box.grad_accum_step).backward()
        if box.stage_grad_count % box.grad_accum_step != 0:
            return
        self._step_optimizer(box)
        scheduler, every = box.lr_scheduler, box.scheduling_step
        if scheduler is not None and every > 0 and box.stage_grad_count % every == 0:
            restarts = isinstance(scheduler, CosineAnnealingWarmRestarts)
            scheduler.step(*[box.stage_grad_count // every] * restarts)

    def _step_optimizer(self, box: Any) -> None:
        parameters = trained_parameters(box.optimizer)
        average_gradients(parameters)
        if box.max_grad_norm is not None:
            self.scaler.unscale_(box.optimizer)
            clip_grad_norm_(parameters, box.max_grad_norm)
        self.scaler.step(box.optimizer)  # passes over gradients that overflowed
        self.scaler.update()
        box.optimizer.zero_grad()
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise FloatingPointError(
                f"float16's gradients overflow even with a loss scale below {SMALLEST_SCALE:g}: lower the lr, or train "
                "with --amp-dtype bfloat16"
            )


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Of all groups of an optimizer, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def takes_our_step(box: Any) -> bool:
    """Whether the stage of ``box`` names no ``post_forward_process`` of its own."""
    return type(box).post_forward_process is default_post_forward_process


def require_our_step(box: Any, amp: torch.dtype | None, stage: str) -> None:
    """Raise a ConfigError if ``stage`` has a ``post_forward_process`` of its own where only ours will do."""
    if takes_our_step(box) or (world() == 1 and amp != torch.float16):
        return
    needs = "several processes need the mean of their gradients" if world() > 1 else "float16 needs scaled gradients"
    instead = "in one process" if world() > 1 else "with --amp-dtype bfloat16"
    raise ConfigError(
        f"train.{stage}.post_forward_process takes the optimizer's step itself, and {needs} there: remove it, or train "
        f"{instead}",
        at=("train", stage, "post_forward_process"),
    )
