"""One stage of the progressive schedule, as torchdistill's box sees it."""

from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.models.registry import register_auxiliary_model_wrapper
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from timm_mamba_pkd.distillation.logits_cache import CachedModel
from timm_mamba_pkd.distillation.rules import Rule, RuleLoss, Verdict, build_rule
from timm_mamba_pkd.distillation.views import Views
from timm_mamba_pkd.models import MambaPKDEnsemble
from timm_mamba_pkd.models.reuse import run_students

STAGE_WRAPPER = "mamba_pkd_stage"
CACHED_TEACHER = "mamba_pkd_cached_teacher"


@register_auxiliary_model_wrapper(key=STAGE_WRAPPER)
class StageWrapper(AuxiliaryModelWrapper):
    """The ensemble in a stage: one student trains, those trained before are frozen and in eval mode, the rest waits.

    In training mode the output is the current student's logits, so torchdistill's losses on ``.`` see the current
    student; in eval mode it is the ensemble's of the students trained so far. Paths of forward hooks, ``sequential``
    and ``frozen_modules`` name modules of the current student, as they would without the wrapper. The mean of the
    earlier students' logits is under ``earlier``, if the rule sees them. The state dict is the ensemble's.

    Args:
        student_model: the ensemble.
        stage: k, from 1.
        name: name in timm's registry of the student to train.
        rule: the schedule's rule, ``{key: ..., kwargs: {...}}``.
        cache_dir: folder for the earlier students' logits; None computes them at every step.

    Attributes:
        position: of the current student in the ensemble, from 0.
        rule: built in the first stage and handed on from stage to stage.
        verdict: the rule's, once the stage is finished.
        started: whether the stage's first epoch in this process has begun, with its caches.
        finished: whether the stage's student is trained, and its part in the combination fitted.
        cache_bytes: what the logits caches that begin in this stage take on disk; known from its first epoch on.
    """

    EARLIER = "earlier"

    def __init__(
        self,
        student_model: nn.Module,
        stage: int,
        name: str,
        rule: dict[str, Any],
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not isinstance(student_model, MambaPKDEnsemble):
            raise ValueError(
                f"a progressive schedule trains a mamba_pkd_ensemble, but the student is {type(student_model).__name__}"
            )
        if stage > len(student_model.students):
            raise ValueError(f"stage {stage} has no student: the ensemble has {len(student_model.students)}")
        shared = student_model.training_state
        if stage == 1:
            shared.clear()
        self.rule: Rule = shared.setdefault("rule", None) or build_rule(rule)
        shared["rule"] = self.rule
        if student_model.combination not in self.rule.combinations:
            raise ValueError(
                f"the rule combines the students by {' or '.join(self.rule.combinations)}, but the ensemble's "
                f"combination is {student_model.combination}"
            )
        order = self.rule.order(len(student_model.students))
        self.stage = stage
        self.position = order[stage - 1]
        self.earlier_positions = order[: stage - 1]
        if name != student_model.names[self.position]:
            raise ValueError(
                f"stage {stage} is to train {name}, but the ensemble's students are {', '.join(student_model.names)}: "
                "give both the same list"
            )
        student_model.drop_policy("are to be trained")
        student_model.set_active(order[:stage])
        student_model.requires_grad_(False)
        self.ensemble = student_model
        self.student = student_model.students[self.position].requires_grad_(True)
        if str(self.position) in student_model.reuse:
            student_model.reuse[str(self.position)].requires_grad_(True)
        self.cache_dir = cache_dir
        self.cache_bytes = 0
        self.verdict: Verdict | None = None
        self.started = False
        self.finished = False
        self.caches: list[CachedModel] = []
        self._seen: dict[str, Any] = {}
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

    def start_rule(self, num_samples: int) -> None:
        """Make the rule's buffers, once before the first stage, or in the process that goes on with a later one."""
        if not self.ensemble.training_state.get("started"):
            self.rule.start(num_samples, self.ensemble.num_classes)
            self.rule.to(next(self.student.parameters()).device)
            self.ensemble.training_state["started"] = True

    def cache_earlier(self, views: Views) -> None:
        """Read the earlier students' logits from the cache from now on."""
        if self.cache_dir is None or not self.rule.sees_earlier:
            return
        self.caches = [
            CachedModel(
                self.cache_dir, self.ensemble.alone(i), self.ensemble.names[i], views, self.ensemble.num_classes
            )
            for i in self.earlier_positions
        ]

    def forward(self, x: Tensor, supp_dict: dict[str, Tensor] | None = None) -> Tensor:
        if not self.training:
            return self.ensemble(x)
        self._seen = {"rule": self.rule, "stage": self.stage, "index": (supp_dict or {}).get("index")}
        if self.rule.sees_earlier:
            self._seen["earlier"] = self._earlier_logits(x, supp_dict)
        else:
            self._seen["earlier"] = x.new_zeros(0, len(x), self.ensemble.num_classes)
        return next(run_students(self.ensemble.students, self.ensemble.connections(), x, [self.position])).float()

    def secondary_forward(self, io_dict: dict[str, Any]) -> None:
        """torchdistill's way to hand more to the losses: the rule and what it sees."""
        io_dict[RuleLoss.IO] = self._seen
        if len(self._seen["earlier"]):
            io_dict[self.EARLIER] = {"output": self._seen["earlier"].mean(0)}

    @torch.no_grad()
    def _earlier_logits(self, x: Tensor, supp_dict: dict[str, Tensor] | None) -> Tensor:
        if not self.earlier_positions:
            return x.new_zeros(0, len(x), self.ensemble.num_classes)
        if self.caches:
            return torch.stack([cached(x, supp_dict) for cached in self.caches])
        positions = sorted(self.earlier_positions)
        logits = run_students(self.ensemble.students, self.ensemble.connections(), x, positions)
        by_position = dict(zip(positions, logits, strict=True))
        return torch.stack([by_position[i].float() for i in self.earlier_positions])

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.ensemble.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.ensemble.load_state_dict(state_dict, strict, assign)


@register_auxiliary_model_wrapper(key=CACHED_TEACHER)
class CachedTeacher(AuxiliaryModelWrapper):
    """The teacher, whose logits on replayable views are computed once: (B, C, H, W) in, logits (B, num_classes) out.

    Args:
        teacher_model: the teacher.
        cache_dir: folder of the caches.
    """

    def __init__(self, teacher_model: nn.Module, cache_dir: str, **kwargs: Any) -> None:
        super().__init__()
        self.teacher = teacher_model
        self.cache_dir = cache_dir
        self.cached: CachedModel | None = None

    def cache(self, views: Views, num_classes: int) -> None:
        """Read the logits from the cache from now on."""
        if self.cached is None:
            self.cached = CachedModel(self.cache_dir, self.teacher, "teacher", views, num_classes)

    def forward(self, x: Tensor, supp_dict: dict[str, Tensor] | None = None) -> Tensor:
        return self.teacher(x) if self.cached is None else self.cached(x, supp_dict)
