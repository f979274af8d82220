"""Each student fits what the teacher minus the ensemble so far leaves."""

from torch import Tensor

from timm_mamba_pkd.distillation.rules.distil import require, soft_loss
from timm_mamba_pkd.distillation.rules.rule import Batch, Rule


class Residual(Rule):
    """Student k's soft targets are the teacher's logits plus what the first k - 1 students leave of them.

    The ensemble after k students is the mean of their logits, so it equals the teacher g exactly when student k
    outputs ``k g - (k - 1) F = g + (k - 1) (g - F)``, F being the mean of the first k - 1. With ``step`` between 0
    and 1 a student corrects only that part of what is left: its target is ``g + step (k - 1) (g - F)``. It is the
    soft loss of Mamba-PKD (arXiv 2503.01727) on what the predecessors leave.

    Args:
        weight: factor of the term, beside the user's criterion (the paper's 1 - alpha, beside alpha on the labels).
        temperature: of the softmax on both sides; the term carries the usual factor temperature squared.
        step: part of the residual to correct, in [0, 1]; 0 is plain distillation from the teacher.
    """

    sees_earlier = True

    def __init__(self, weight: float = 0.5, temperature: float = 4.0, step: float = 1.0) -> None:
        super().__init__()
        require(weight > 0, "residual", "weight", "positive", weight)
        require(temperature > 0, "residual", "temperature", "positive", temperature)
        require(0 <= step <= 1, "residual", "step", "from 0 to 1", step)
        self.weight = weight
        self.temperature = temperature
        self.step = step

    def loss(self, batch: Batch) -> Tensor:
        target = batch.teacher
        if len(batch.earlier):
            target = target + self.step * (batch.stage - 1) * (target - batch.earlier.mean(0))
        return self.weight * soft_loss(batch.student, target, self.temperature)
