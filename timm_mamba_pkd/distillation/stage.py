"""One stage of the progressive schedule, as torchdistill's box sees it."""

from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.core.interfaces.pre_epoch_proc import default_pre_epoch_process_with_teacher
from torchdistill.core.interfaces.registry import register_pre_epoch_proc_func
from torchdistill.models.registry import register_auxiliary_model_wrapper
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from timm_mamba_pkd.models import MambaPKDEnsemble

STAGE_WRAPPER = "mamba_pkd_stage"
TEACHER_IN_EVAL = "mamba_pkd_teacher_in_eval"


@register_auxiliary_model_wrapper(key=STAGE_WRAPPER)
class StageWrapper(AuxiliaryModelWrapper):
    """The ensemble in stage k: student k trains, the earlier ones are frozen and in eval mode, the rest waits.

    In training mode the output is student k's logits, so torchdistill's losses on ``.`` see the current student; in
    eval mode it is the ensemble's after k students. Paths of forward hooks, ``sequential`` and ``frozen_modules``
    name modules of the current student, as they would without the wrapper. The state dict is the ensemble's.

    Args:
        student_model: the ensemble.
        stage: k, from 1.
        name: student k's name in timm's registry.
        sees_earlier: run the earlier students in training, so that hooks on ``earlier`` see their ensemble logits.
    """

    def __init__(self, student_model: nn.Module, stage: int, name: str, sees_earlier: bool, **kwargs: Any) -> None:
        super().__init__()
        if not isinstance(student_model, MambaPKDEnsemble):
            raise ValueError(
                f"a progressive schedule trains a mamba_pkd_ensemble, but the student is {type(student_model).__name__}"
            )
        if stage > len(student_model.students):
            raise ValueError(f"stage {stage} has no student: the ensemble has {len(student_model.students)}")
        if name != student_model.names[stage - 1]:
            raise ValueError(
                f"stage {stage} is to train {name}, but the ensemble's students are {', '.join(student_model.names)}: "
                "give both the same list"
            )
        student_model.set_active(stage)
        student_model.requires_grad_(False)
        self.ensemble = student_model
        self.student = student_model.students[stage - 1].requires_grad_(True)
        self.earlier = student_model.first(stage - 1) if sees_earlier and stage > 1 else None
        self.train(student_model.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("student"), name)

    def train(self, mode: bool = True) -> "StageWrapper":
        super().train(mode)
        self.ensemble.eval()
        self.student.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.ensemble(x)
        if self.earlier is not None:
            with torch.no_grad():
                self.earlier(x)
        return self.student(x).float()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.ensemble.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.ensemble.load_state_dict(state_dict, strict, assign)


@register_pre_epoch_proc_func(key=TEACHER_IN_EVAL)
def pre_epoch_with_teacher_in_eval(self: Any, epoch: int | None = None, **kwargs: Any) -> None:
    """torchdistill's own pre-epoch process, and the teacher in eval mode, where torchdistill never puts it."""
    default_pre_epoch_process_with_teacher(self, epoch=epoch, **kwargs)
    self.teacher_model.eval()
