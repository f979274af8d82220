"""Connections by which a student reuses the features of students before it (B-DISTIL, arXiv 2302.10093, step 3)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_mamba_pkd.models.mamba_pkd import MambaPKD


class Reuse(nn.Module):
    """One 1x1 convolution per stage, from the concatenated features of earlier students to this student's.

    The convolutions start at zero, so that a student starts as it is without them.

    Args:
        student: the student that reuses.
        sources: the students whose features it reuses.
    """

    def __init__(self, student: MambaPKD, sources: Sequence[MambaPKD]) -> None:
        super().__init__()
        widths = [[stage["num_chs"] for stage in model.feature_info] for model in (*sources, student)]
        like: Any = next(student.parameters())
        self.num_sources = len(sources)
        self.projections = nn.ModuleList(
            nn.Conv2d(sum(width[:-1]), width[-1], 1, bias=False, device=like.device, dtype=like.dtype)
            for width in zip(*widths, strict=True)
        )
        for projection in self.projections:
            nn.init.zeros_(projection.weight)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def take_over(self, fewer: "Reuse") -> None:
        """Take the weights of connections to as many, or fewer and nearer, sources."""
        for own, other in zip(self.projections, fewer.projections, strict=True):
            own.weight[:, -other.weight.shape[1] :] = other.weight  # pyright: ignore


class Pass:
    """One pass of images through students, whose features are computed once where others reuse them.

    Args:
        students: in the order of evaluation.
        reuse: of each student, its connections or None.
        x: images (B, in_chans, H, W).
    """

    def __init__(self, students: Sequence[nn.Module], reuse: Sequence[Reuse | None], x: Tensor) -> None:
        self._students, self._reuse, self._x = students, reuse, x
        self._shared = {j for i, own in enumerate(reuse) if own is not None for j in range(i - own.num_sources, i)}
        self._features: dict[int, list[Tensor]] = {}

    def logits(self, position: int) -> Tensor:
        """Logits (B, C) of the student at ``position`` (from 0); those it reuses run with it if they have not yet."""
        student: Any = self._students[position]
        if self._reuse[position] is None and position not in self._shared:
            return student(self._x)
        return student.forward_head(self._features_of(position)[-1])

    def keep(self, indices: Tensor) -> None:
        """Go on with the images at ``indices``, int64 (n,), of the present ones alone."""
        self._x = self._x[indices]
        self._features = {i: [stage[indices] for stage in stages] for i, stages in self._features.items()}

    def _features_of(self, i: int) -> list[Tensor]:
        if i not in self._features:
            own = self._reuse[i]
            sources = [self._features_of(j) for j in range(i - own.num_sources, i)] if own is not None else []
            self._features[i] = stage_features(self._students[i], self._x, own, sources)
        return self._features[i]


def run_students(
    students: Sequence[nn.Module], reuse: Sequence[Reuse | None], x: Tensor, positions: Iterable[int]
) -> Iterator[Tensor]:
    """Yield the logits (B, C) of the students at ``positions``, each as it finishes; arguments as of `Pass`."""
    run = Pass(students, reuse, x)
    return (run.logits(position) for position in positions)


def stage_features(student: Any, x: Tensor, own: Reuse | None, sources: list[list[Tensor]]) -> list[Tensor]:
    """Features of each stage of ``student``, from images (B, C, H, W) and, by its connections, those of ``sources``."""
    features = []
    x = student.stem(x)
    for i, stage in enumerate(student.stages):
        x = stage(x)
        if own is not None:
            x = x + own.projections[i](torch.cat([source[i] for source in sources], 1))
        features.append(x)
    return features
