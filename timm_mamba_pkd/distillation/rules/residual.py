"""Each student fits what the teacher minus the ensemble so far leaves."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchdistill.losses.registry import register_mid_level_loss

from timm_mamba_pkd.distillation.rules.rule import Rule


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
        if not weight > 0:
            raise ValueError(f"residual: weight must be positive, got {weight}")
        if not temperature > 0:
            raise ValueError(f"residual: temperature must be positive, got {temperature}")
        if not 0 <= step <= 1:
            raise ValueError(f"residual: step must be from 0 to 1, got {step}")
        self.weight = weight
        self.temperature = temperature
        self.step = step

    def loss_terms(self, stage: int) -> dict[str, dict[str, Any]]:
        kwargs = {"gain": self.step * (stage - 1), "temperature": self.temperature}
        return {"residual": {"criterion": {"key": "mamba_pkd_residual", "kwargs": kwargs}, "weight": self.weight}}


@register_mid_level_loss(key="mamba_pkd_residual")
class ResidualLoss(nn.Module):
    """KL divergence from the residual target ``g + gain (g - F)`` to the student, at a temperature, times its square.

    g are the teacher's logits, F the earlier students' ensemble logits, each (B, C); the result is the mean over B.
    """

    def __init__(self, gain: float, temperature: float) -> None:
        super().__init__()
        self.gain = gain
        self.temperature = temperature

    def forward(
        self,
        student_io_dict: dict[str, dict[str, Tensor]],
        teacher_io_dict: dict[str, dict[str, Tensor]],
        targets: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        student = student_io_dict["."]["output"]
        teacher = teacher_io_dict["."]["output"]
        target = teacher
        if self.gain > 0:
            target = teacher + self.gain * (teacher - student_io_dict[Rule.EARLIER]["output"].to(teacher.dtype))
        t = self.temperature
        log_p = F.log_softmax(student / t, dim=-1)
        return t * t * F.kl_div(log_p, F.log_softmax(target / t, dim=-1), reduction="batchmean", log_target=True)
