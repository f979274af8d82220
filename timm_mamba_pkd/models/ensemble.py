"""The anytime ensemble: students s1..sN as one classifier that has an answer after every student."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models import build_model_with_cfg, create_model, generate_default_cfgs, register_model
from torch import Tensor, nn

from timm_mamba_pkd.models.adaptation import adapt_to, adapted
from timm_mamba_pkd.models.arguments import (
    check_count,
    check_dtype,
    check_images,
    check_img_size,
    check_like,
    check_names,
    check_rates,
    is_whole,
)
from timm_mamba_pkd.models.cascade import Prediction, known
from timm_mamba_pkd.models.combination import COMBINATIONS, combine, uniform_weights
from timm_mamba_pkd.models.macs import count_macs
from timm_mamba_pkd.models.mamba_pkd import STUDENTS, TAGS, MambaPKD, cfg
from timm_mamba_pkd.models.policies import Confidence, Policy, predict
from timm_mamba_pkd.models.reuse import Pass, Reuse, run_students
from timm_mamba_pkd.models.state_dict import classifier_names, fit_state_dict, require_architecture
from timm_mamba_pkd.models.students import Students

__all__ = ["MambaPKDEnsemble"]

_logger = logging.getLogger(__name__)


class MambaPKDEnsemble(nn.Module):
    """Progressively distilled students as one anytime classifier (Mamba-PKD, arXiv 2503.01727).

    The prediction after k students is the mean of their logits (B-DISTIL, arXiv 2302.10093, step 5), or a weighted
    sum whose weights are fitted on held-out data and belong to the state dict.

    Args:
        students: names of ours or of any other timm models, in the order of evaluation; they may repeat.
        num_classes, in_chans: of every student.
        img_size: image size the students are made for, (height, width) or one number.
        global_pool: of every student; None for each model's own.
        combination: 'mean' of the logits, or weights 'per_student' or 'per_class' (and student), which are those of
            the mean until they are fitted.
        drop_rate, drop_path_rate: of every student.
        device, dtype: of the parameters.

    Attributes:
        students: the students, evaluated in this order.
        active: bool buffer (N,), which students `forward` uses; part of the state dict. Change it by `set_active`.
        weights: float32 buffer, see `uniform_weights`; None for the mean. Part of the state dict.
        training_state: what a schedule hands on from stage to stage; no part of the state dict.
        reuse: the connections of students that reuse the features of earlier ones, by position from 0.
        policy: fitted thresholds of `predict`, or None; part of the state dict. It is dropped, with a warning, when
            the ensemble runs in training mode, and when classifiers, combination or all weights start anew.

    A state dict with weights, connections or a policy brings them along: an ensemble that lacks them gets them on
    loading.

    Raises:
        ValueError: an argument is of a wrong type or out of its range.
    """

    active: Tensor
    weights: Tensor | None
    policy: Confidence | None

    def __init__(
        self,
        students: Sequence[str] = tuple(STUDENTS),
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        global_pool: str | None = None,
        combination: str = "mean",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_names(students)
        check_count("num_classes", num_classes, 1)
        check_count("in_chans", in_chans, 1)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_dtype(dtype)
        _check_pool(global_pool)
        self.names = tuple(students)
        self.num_classes = num_classes
        self.adapts_classifier = False  # to the first weights, where num_classes was given
        self.in_chans = in_chans
        self.global_pool = global_pool
        kwargs: dict[str, Any] = {
            "num_classes": num_classes,
            "in_chans": in_chans,
            "global_pool": global_pool,  # None is not passed on: not every timm model has each of these
            "drop_rate": drop_rate or None,
            "drop_path_rate": drop_path_rate or None,
            "device": device,
            "dtype": dtype,
        }
        self.students: Any = nn.ModuleList(create_model(name, **kwargs) for name in students)
        for student in self.students:
            if isinstance(student, MambaPKD):
                student.adapts_classifier = False
        self._traits: dict[str, Any] = {"first_conv": _stems(self.students)}  # which timm adapts to other channels
        self.set_input_size(img_size)
        self.reuse = nn.ModuleDict()
        self.policy = None
        self.training_state: dict[str, Any] = {}
        self.register_buffer("active", torch.ones(len(self.students), dtype=torch.bool, device=device))
        self._positions = list(range(len(self.students)))  # of the active ones: a graph must not look into the buffer
        self.register_buffer("weights", uniform_weights(len(self.students), num_classes, combination, device))
        self.register_load_state_dict_pre_hook(_adapt_before_loading)
        self.register_load_state_dict_post_hook(_read_active)

    def init_weights(self) -> None:
        """Reset every parameter and buffer, reproducibly from torch's seed: connections to zero, weights to the mean.

        A policy is no longer there.

        Raises:
            AttributeError: a student is a timm model without ``init_weights``.
        """
        for student in self.students:
            student.init_weights()
        for parameter in self.reuse.parameters():
            nn.init.zeros_(parameter)
        self.set_active(len(self.students))
        self.set_combination(self.combination)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Set the image size that the students are made for, where they are made for one."""
        self.img_size = check_img_size(img_size)
        self._traits = {**getattr(self, "_traits", {}), "img_size": self.img_size}  # which timm saves with a model
        for student in self.students:
            if hasattr(student, "set_input_size"):
                student.set_input_size(img_size=self.img_size)

    @property
    def num_features(self) -> int:
        """Features that the students' classifiers see, of all students together."""
        return sum(student.num_features for student in self.students)

    def set_active(self, students: int | Iterable[int]) -> None:
        """Let `forward` use the first ``students`` students, or those at these positions (from 0)."""
        count = len(self.students)
        if not isinstance(students, Iterable):
            check_count("k", students, 1, count)
        positions = list(students) if isinstance(students, Iterable) else range(students)
        if not positions or not all(is_whole(position) and 0 <= position < count for position in positions):
            raise ValueError(f"active students must be positions from 0 to {count - 1}, got {students!r}")
        self._positions = sorted(set(positions))
        self.active.fill_(False)
        self.active[self._positions] = True

    @property
    def active_positions(self) -> list[int]:
        """Positions (from 0) of the active students."""
        return list(self._positions)

    @property
    def num_active(self) -> int:
        """How many students `forward` uses."""
        return len(self._positions)

    @property
    def combination(self) -> str:
        """How the students' logits are combined: 'mean', 'per_student' or 'per_class'."""
        return "mean" if self.weights is None else COMBINATIONS[self.weights.ndim - 1]

    def drop_policy(self, why: str) -> None:
        """Be without a policy; a warning says ``why`` (the weights ...), if there was one."""
        if self.policy is not None:
            _logger.warning("The policy of early exit is dropped: the weights it was fitted for %s. Fit another", why)
        self.policy = None

    def set_combination(self, combination: str) -> None:
        """Combine by 'mean', 'per_student' or 'per_class', with the weights of the mean, and without a policy."""
        self.drop_policy("start anew")
        self.weights = uniform_weights(len(self.students), self.num_classes, combination, self.active.device)

    def connect(self, position: int, num_sources: int) -> None:
        """Let the student at ``position`` (from 0) reuse the features of the ``num_sources`` students before it.

        Connections that it has to no more students than that keep their weights, new ones start at zero.

        Raises:
            ValueError: there are fewer students before it, or one of them is none of ours.
        """
        if not 1 <= num_sources <= position < len(self.students):
            raise ValueError(f"student {position + 1} has {position} before it, so it cannot reuse {num_sources}")
        if not self.can_connect(position, num_sources):
            raise ValueError(f"only {', '.join(STUDENTS)} can reuse features, not {', '.join(self.names)}")
        models = self.students[position - num_sources : position + 1]
        new = Reuse(models[-1], list(models)[:-1])
        known = self.connections()[position]
        if known is not None and known.num_sources <= num_sources:
            new.take_over(known)
        self.reuse[str(position)] = new

    def can_connect(self, position: int, num_sources: int) -> bool:
        """Whether the student at ``position`` and the ``num_sources`` before it are all ours."""
        models = self.students[position - num_sources : position + 1]
        return all(isinstance(model, MambaPKD) for model in models)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; but where ``num_classes`` was given, the first weights may be of another class count.

        They then leave the classifiers alone, with a warning; if not ``strict``, their keys are among the missing ones.

        Raises:
            RuntimeError: the state dict is of other students or class count; names the first keys that differ.
        """
        with adapted(self, state_dict) as found:
            if self.adapts_classifier and self._is_of_another_class_count(found):
                self.set_combination(self.combination)
                found = {name: tensor for name, tensor in found.items() if not name.startswith("policy.")}
                found |= {} if self.weights is None else {"weights": self.weights}
            fitting = fit_state_dict(self, found, strict, self.adapts_classifier)
        keys = super().load_state_dict(fitting, strict, assign)
        self.adapts_classifier = False
        return keys

    def _is_of_another_class_count(self, state_dict: Mapping[str, Tensor]) -> bool:
        own = self.state_dict()
        shared = classifier_names(self) & own.keys() & state_dict.keys()
        return any(state_dict[name].shape != own[name].shape for name in shared)

    def connections(self) -> list[Reuse | None]:
        """Of each student, the connections to earlier ones or None."""
        found: Any = dict(self.reuse.items())
        return [found.get(str(i)) for i in range(len(self.students))]

    def first(self, k: int) -> Students:
        """The first ``k`` students as a classifier of its own, which shares their parameters.

        It has no `predict`: for early exit among the first ``k`` use ``set_active(k)``.

        Raises:
            ValueError: there are not so many.
        """
        check_count("k", k, 1, len(self.students))
        return Students(self, range(k))

    def alone(self, position: int) -> nn.Module:
        """The student at ``position`` (from 0) as a classifier of its own, with what it reuses of earlier ones."""
        return Students(self, [position]) if str(position) in self.reuse else self.students[position]

    def run(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the logits (B, num_classes) of each active student alone as it finishes."""
        if self.training:
            self.drop_policy("are being trained")
        return run_students(self.students, self.connections(), x, self.active_positions)

    def student_logits(self, x: Tensor) -> Tensor:
        """Logits of each active student alone: (k, B, num_classes)."""
        return torch.stack(list(self.run(x)))

    def combine(self, student_logits: Tensor | Sequence[Tensor]) -> Tensor:
        """Ensemble logits after each student, (k, B, num_classes), from the students' own, (k, B, num_classes).

        The weights are those of the first students: where others are active it is the mean.
        """
        fits = self.weights is not None and self.active_positions == list(range(self.num_active))
        return combine(student_logits, self.weights if fits else None)

    def steps(self, x: Tensor) -> Pass:
        """Begin a pass of images (B, in_chans, H, W) that runs students one by one."""
        return Pass(self.students, self.connections(), x)

    def parts(self) -> list[Any]:
        """The modules of the students and of what they reuse, and what else changes costs, see `known`."""
        modules: list[Any] = [self.students, self.reuse]
        for module in modules:  # which grows; `modules()` takes eight times as long
            if module._modules:
                modules += [child for child in module._modules.values() if child is not None]
        return [*modules, *(student._compiled_call_impl for student in self.students), self.img_size, self.combination]

    def step_macs(self, input_size: Sequence[int]) -> list[int]:
        """Multiply-accumulates that each active student adds to those before it, on an image of ``input_size``.

        They are counted once, and anew when a module of a student has been replaced, the combination or the image size
        set.
        """
        positions, counts = self.active_positions, known(self)
        channels, height, width = input_size
        size = (channels, height, width)
        key = "macs", size, tuple(positions)
        if key not in counts:
            if any(self.connections()):
                ends = [Students(self, positions[:k]) for k in range(1, len(positions) + 1)]
                totals = [0, *(count_macs(students, size) for students in ends)]
                counts[key] = [after - before for before, after in pairwise(totals)]
            else:
                counts[key] = [count_macs(self.students[i], size) for i in positions]
        return counts[key]

    def predict(self, x: Tensor, policy: Policy | None = None) -> Prediction:
        """Predict images (B, in_chans, H, W) in eval mode, each by as few students as a policy lets it use.

        After each student those images that leave are taken out of the batch, so that what is saved is not computed;
        the rest is padded to few sizes, see `padded`. No gradients are recorded.

        Args:
            x: the images.
            policy: `Confidence`, `Agreement`, `Budget` or `Depth`; None for the ensemble's own.

        Raises:
            ValueError: as of `anytime`; there is no policy, it cannot serve this ensemble or batch, or the ensemble is
                in training mode.
        """
        if self.training:
            raise ValueError("predict needs eval mode: call eval() before")
        self._check_images(x)
        return predict(self, x, self.policy if policy is None else policy)

    def anytime(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (k, ensemble logits (B, num_classes) after k students) as each active student finishes.

        Raises:
            ValueError: ``x`` are no images (B, in_chans, H, W), too small, or of another dtype or device than the
                weights, or these are on the meta device.
        """
        self._check_images(x)
        return self._anytime(x)

    def _check_images(self, x: Any) -> None:
        check_images(x, self.in_chans)
        check_like(x, next(parameter for parameter in self.students.parameters() if parameter.is_floating_point()))

    def _anytime(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        done: list[Tensor] = []
        for logits in self.run(x):
            done.append(logits)
            yield len(done), self.combine(done)[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Ensemble logits (B, num_classes) after the active students, for images (B, in_chans, H, W)."""
        return self.combine(list(self.run(x)))[-1]

    def get_classifier(self) -> nn.ModuleList:
        return nn.ModuleList(student.get_classifier() for student in self.students)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        check_count("num_classes", num_classes, 1)
        _check_pool(global_pool)
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        for student in self.students:
            student.reset_classifier(num_classes, global_pool)
        self.set_combination(self.combination)

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


def _adapt_before_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    assert isinstance(module, MambaPKDEnsemble)
    own = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    for name, tensor in adapt_to(module, own).items():
        state_dict[prefix + name] = tensor


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Native weights, bare or under torchdistill's ``model`` key.

    Raises:
        RuntimeError: they are of other students; names them, or the first keys that differ.
    """
    assert isinstance(model, MambaPKDEnsemble)
    own: Any = model.pretrained_cfg
    packaged = TAGS.get(own.get("tag"), {}).get("file")
    if packaged is not None and own.get("file") == packaged and model.names != tuple(STUDENTS):
        raise RuntimeError(
            f"the weights of mamba_pkd_ensemble.{own['tag']} are of {len(STUDENTS)} students, {', '.join(STUDENTS)}, "
            f"not of {', '.join(model.names)}"
        )
    state_dict = state_dict.get("model", state_dict)
    state_dict = {**state_dict, **adapt_to(model, state_dict)}
    stems = {f"{name}.weight" for name in model._traits["first_conv"]}
    require_architecture(model, state_dict, {"weights", *stems, *classifier_names(model)})
    return state_dict


def _stems(students: Iterable[Any]) -> tuple[str, ...]:
    """The students' first convolutions, by timm's records of them."""
    found: list[str] = []
    for i, student in enumerate(students):
        record = getattr(student, "pretrained_cfg", {})  # which a model that a user registered may lack
        names = getattr(student, "_traits", {}).get("first_conv", record.get("first_conv")) or ()
        found += [f"students.{i}.{name}" for name in ([names] if isinstance(names, str) else names)]
    return tuple(found)


def _check_pool(global_pool: Any) -> None:
    if global_pool is not None and not (isinstance(global_pool, str) and global_pool):
        raise ValueError(f"global_pool must be a pooling of the students, such as 'avg', got {global_pool!r}")


def _read_active(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, MambaPKDEnsemble)
    if not module.active.is_meta:
        module._positions = module.active.nonzero()[:, 0].tolist()


default_cfgs = generate_default_cfgs(
    {f"mamba_pkd_ensemble.{tag}": cfg(first_conv=(), classifier=(), **traits) for tag, traits in TAGS.items()}
)


@register_model
def mamba_pkd_ensemble(pretrained: bool = False, **kwargs: Any) -> MambaPKDEnsemble:
    """Anytime ensemble of the students named by ``students`` (default: s1 to s7)."""
    if kwargs.get("features_only"):
        raise RuntimeError("features_only not implemented for mamba_pkd_ensemble: its students have features")
    given = "num_classes" in kwargs

    def filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        model.adapts_classifier = given  # pyright: ignore[reportArgumentType]
        return checkpoint_filter_fn(state_dict, model)

    model: Any = build_model_with_cfg(
        MambaPKDEnsemble, "mamba_pkd_ensemble", pretrained, pretrained_filter_fn=filter_fn, **kwargs
    )
    model.adapts_classifier = given and not pretrained
    if "img_size" not in kwargs:
        model.set_input_size(model.pretrained_cfg["input_size"][1:])
    return model
