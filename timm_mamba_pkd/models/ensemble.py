"""The anytime ensemble: students s1..sN as one classifier that has an answer after every student."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, create_model, generate_default_cfgs, is_model, register_model
from torch import Tensor, nn

from timm_mamba_pkd.models.mamba_pkd import STUDENTS, cfg

__all__ = ["MambaPKDEnsemble"]


class MambaPKDEnsemble(nn.Module):
    """Progressively distilled students as one anytime classifier (Mamba-PKD, arXiv 2503.01727).

    The prediction after k students is the mean of their logits (B-DISTIL, arXiv 2302.10093, step 5).

    Args:
        students: names of ours or of any other timm models, in the order of evaluation; they may repeat.
        num_classes, in_chans: of every student.
        img_size: image size the students are made for, (height, width) or one number.
        drop_rate, drop_path_rate: of every student.
        device, dtype: of the parameters.

    Attributes:
        students: the students, evaluated in this order.
        num_active: int64 buffer, how many students `forward` uses; part of the checkpoint.
    """

    num_active: Tensor

    def __init__(
        self,
        students: Sequence[str] = tuple(STUDENTS),
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(students, str) or not students:
            raise ValueError(f"students must be a list of at least one model name, got {students!r}")
        unknown = [name for name in students if not is_model(name)]
        if unknown:
            raise ValueError(f"unknown student '{unknown[0]}'; ours are {', '.join(STUDENTS)}, or any timm model")
        self.names = tuple(students)
        self.num_classes = num_classes
        self.in_chans = in_chans
        kwargs: dict[str, Any] = {
            "num_classes": num_classes,
            "in_chans": in_chans,
            "drop_rate": drop_rate or None,  # None is not passed on: not every timm model has drop paths
            "drop_path_rate": drop_path_rate or None,
            "device": device,
            "dtype": dtype,
        }
        self.students: Any = nn.ModuleList(create_model(name, **kwargs) for name in students)
        for student in self.students:
            if hasattr(student, "set_input_size"):
                student.set_input_size(img_size=img_size)
        self.register_buffer("num_active", torch.tensor(len(self.students), device=device))

    def set_active(self, k: int) -> None:
        """Let `forward` use the first ``k`` students."""
        if not 1 <= k <= len(self.students):
            raise ValueError(f"k must be from 1 to {len(self.students)}, got {k}")
        self.num_active.fill_(k)

    def first(self, k: int) -> "FirstStudents":
        """The first ``k`` students as a classifier of its own, which shares their parameters."""
        return FirstStudents(self.students[:k])

    def student_logits(self, x: Tensor) -> Tensor:
        """Logits of each active student alone: (k, B, num_classes)."""
        return torch.stack([student(x) for student in self.students[: int(self.num_active)]])

    @staticmethod
    def combine(student_logits: Tensor) -> Tensor:
        """Ensemble logits after each student, (k, B, num_classes), from the students' own: their running mean."""
        counts = torch.arange(1, len(student_logits) + 1, device=student_logits.device, dtype=student_logits.dtype)
        return student_logits.cumsum(0) / counts[:, None, None]

    def anytime(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (k, ensemble logits (B, num_classes) after k students) as each active student finishes."""
        total = None
        for k, student in enumerate(self.students[: int(self.num_active)], start=1):
            logits = student(x)
            total = logits if total is None else total + logits
            yield k, total / k

    def forward(self, x: Tensor) -> Tensor:
        """Ensemble logits (B, num_classes) after the active students, for images (B, in_chans, H, W)."""
        return self.student_logits(x).mean(0)

    def get_classifier(self) -> nn.ModuleList:
        return nn.ModuleList(student.get_classifier() for student in self.students)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        for student in self.students:
            student.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for student in self.students:
            student.set_grad_checkpointing(enable)

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay(self) -> set[str]:
        return {
            f"students.{i}.{name}"
            for i, student in enumerate(self.students)
            if hasattr(student, "no_weight_decay")
            for name in student.no_weight_decay()
        }


class FirstStudents(nn.Module):
    """Mean of the logits of a fixed number of students: (B, in_chans, H, W) in, (B, num_classes) out."""

    def __init__(self, students: nn.ModuleList) -> None:
        super().__init__()
        self.students = students

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([student(x) for student in self.students]).mean(0)


default_cfgs = generate_default_cfgs({"mamba_pkd_ensemble.untrained": cfg(first_conv=(), classifier=())})


@register_model
def mamba_pkd_ensemble(pretrained: bool = False, **kwargs: Any) -> MambaPKDEnsemble:
    """Anytime ensemble of the students named by ``students`` (default: s1 to s7)."""
    return build_model_with_cfg(MambaPKDEnsemble, "mamba_pkd_ensemble", pretrained, **kwargs)
