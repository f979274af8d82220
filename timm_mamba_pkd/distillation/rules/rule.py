"""What a progressive rule is: the one interface of this room."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from timm_mamba_pkd.models.combination import COMBINATIONS


@dataclass(frozen=True)
class Batch:
    """What a rule sees of a training batch in stage k; logits are float32, none but the student's carry gradients.

    Attributes:
        student: logits (B, C) of the student in training.
        teacher: the teacher's logits (B, C).
        earlier: logits (k - 1, B, C) of the students trained before, in the order of training.
        targets: labels (B,), int64; or shares of the classes (B, C), float32, with mixup and cutmix.
        index: the samples' indices in the training set (B,), int64; None where it is read as a stream.
        stage: k, from 1.
    """

    student: Tensor
    teacher: Tensor
    earlier: Tensor
    targets: Tensor
    index: Tensor | None
    stage: int


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a finished stage.

    Attributes:
        passed: False asks for the student to be trained again, with connections to earlier students' features.
        metrics: numbers to log and report, by name.
        message: one line for the log.
    """

    passed: bool
    metrics: dict[str, float]
    message: str


class Rule(nn.Module):
    """How a stage's student is related to the teacher and to the students before it.

    A rule is a subclass in a file of its own, named in YAML by one line: ``rule: residual`` for one of ours, ``rule:
    my_package.my_rule.MyRule`` for anybody's, ``rule: {key: ..., kwargs: {...}}`` with parameters, which are the
    constructor's; values out of range raise a ValueError. State that lasts from stage to stage is kept in buffers,
    which are saved with the run. `timm_mamba_pkd.distillation.rules.contract` tests a rule.

    Attributes:
        sees_earlier: whether `loss` reads ``batch.earlier``; if not, the earlier students do not run.
        adds_loss: False if the user's criterion is all there is and `loss` is never called.
        largest_first: train the ensemble's students from the last to the first.
        judges: whether `finish_stage` wants the logits of the whole training set after each stage.
        combinations: of the ensemble (the ``combination`` of ``mamba_pkd_ensemble``) that suit the rule.
        max_retries: how often a student whose verdict is not passed is trained again, each time with connections to
            one more of the students before it.
    """

    sees_earlier: bool = False
    adds_loss: bool = True
    largest_first: bool = False
    judges: bool = False
    combinations: tuple[str, ...] = COMBINATIONS
    max_retries: int = 0

    def order(self, num_students: int) -> list[int]:
        """Positions (from 0) of the ensemble's students in the order of training."""
        order = list(range(num_students))
        return order[::-1] if self.largest_first else order

    def start(self, num_samples: int, num_classes: int) -> None:
        """Called before the first stage: make the buffers."""

    def loss(self, batch: Batch) -> Tensor:
        """The rule's own term of the loss (a scalar, added to the user's criterion)."""
        raise NotImplementedError(f"rule {type(self).__name__} has adds_loss, but no method loss")

    def finish_stage(self, student: Tensor, teacher: Tensor, stage: int) -> Verdict:
        """Called after a stage if the rule ``judges``.

        Args:
            student, teacher: logits (N, C) of the student just trained and of the teacher, float32, on view 0 of every
                training sample, by index.
            stage: k, from 1.
        """
        raise NotImplementedError(f"rule {type(self).__name__} judges, but has no method finish_stage")

    def accept_stage(self, student: Tensor, teacher: Tensor, stage: int) -> None:
        """Called after `finish_stage` when the student is kept, passed or not: update the weights of the samples."""


@register_mid_level_loss(key="mamba_pkd_rule")
class RuleLoss(nn.Module):
    """The loss of the stage's rule, as one of torchdistill's: `StageWrapper` hands over rule and batch."""

    IO = "mamba_pkd_rule"

    def forward(
        self,
        student_io_dict: dict[str, dict[str, Any]],
        teacher_io_dict: dict[str, dict[str, Any]],
        targets: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        seen = student_io_dict[self.IO]
        student = student_io_dict["."]["output"].float()
        batch = Batch(
            student=student,
            teacher=teacher_io_dict["."]["output"].detach().float(),
            earlier=seen["earlier"],
            targets=targets,
            index=None if seen["index"] is None else seen["index"].to(student.device),
            stage=seen["stage"],
        )
        loss = seen["rule"].loss(batch)
        if not isinstance(loss, Tensor) or loss.ndim > 0:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"rule {type(seen['rule']).__name__}: loss must return a tensor of one number, not {found}"
            )
        if student.requires_grad and not loss.requires_grad:
            raise ValueError(f"rule {type(seen['rule']).__name__}: its loss does not depend on the student")
        return loss
