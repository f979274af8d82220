"""The moving average of the weights in training, timm's ``--model-ema``."""

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from timm_mamba_pkd.distillation import StageWrapper


class WeightAverage:
    """The exponential moving average of what a stage trains, from its first step on.

    Args:
        model: what is trained; the average starts from its weights after the first step.
        decay: share of the average that a step keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.average = ModelEmaV3(model, decay=decay)
        self.updates = 0

    def update(self) -> None:
        """Take in the weights after a step of the optimizer."""
        self.updates += 1
        self.average.update(self.model, step=self.updates)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the average, in place."""
        pairs = zip(self.model.state_dict().values(), self.average.module.state_dict().values(), strict=True)
        for own, average in pairs:
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        return {"updates": self.updates, "weights": self.average.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state of `state_dict`."""
        self.updates = state["updates"]
        self.average.module.load_state_dict(state["weights"])


def in_training(student: nn.Module, box: Any) -> nn.Module:
    """What the stage of ``box`` trains of ``student``: a schedule's current student and its connections, or all."""
    wrapper = getattr(box, "student_model", None)
    if not isinstance(wrapper, StageWrapper):
        return student
    connections = wrapper.ensemble.connections()[wrapper.position]
    return nn.ModuleList([wrapper.student, *([] if connections is None else [connections])])
