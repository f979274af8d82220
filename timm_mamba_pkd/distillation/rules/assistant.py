"""Every student is the teacher of the next smaller one."""

from torch import Tensor

from timm_mamba_pkd.distillation.rules.distil import require, soft_loss
from timm_mamba_pkd.distillation.rules.rule import Batch, Rule


class Assistant(Rule):
    """Teacher assistants (arXiv 1902.03393): the largest student learns from the teacher, each smaller one from the one
    before it. The ensemble still evaluates the smallest first.

    Args:
        weight: factor of the term, beside the user's criterion.
        temperature: of the softmax on both sides; the term carries the usual factor temperature squared.
    """

    sees_earlier = True
    largest_first = True

    def __init__(self, weight: float = 0.5, temperature: float = 4.0) -> None:
        super().__init__()
        require(weight > 0, "assistant", "weight", "positive", weight)
        require(temperature > 0, "assistant", "temperature", "positive", temperature)
        self.weight = weight
        self.temperature = temperature

    def loss(self, batch: Batch) -> Tensor:
        target = batch.earlier[-1] if len(batch.earlier) else batch.teacher
        return self.weight * soft_loss(batch.student, target, self.temperature)
