"""Early exit that exits: student after student runs on the images that still need it, and on no others."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """What a cascade says of a batch of B images.

    Attributes:
        logits: ensemble logits (B, num_classes) after the students that each image used.
        students: how many those are, int64 (B,).
        macs: the multiply-accumulates spent on the whole batch, padding included, counted as `count_macs` does.
    """

    logits: Tensor
    students: Tensor
    macs: int


def padded(count: int) -> int:
    """The size of the batch in which ``count`` images go on: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, ...

    Kernels are made, chosen or compiled for a batch size when it first comes, which takes longer than the few images
    that are computed in vain.
    """
    power = 1 << max(count - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


class Steps(Protocol):
    """One pass of images through students, one by one."""

    def logits(self, position: int) -> Tensor:
        """Logits (n, num_classes) of the student at ``position`` alone."""
        ...

    def keep(self, indices: Tensor) -> None:
        """Go on with the images at ``indices``, int64 (n',), of the present ones alone."""
        ...


class Cascade(Protocol):
    """Students that can be run one after the other: an ensemble, or the files exported from one."""

    def parts(self) -> list[Any]:
        """What it consists of: what was counted or timed holds as long as these are equal to what they were."""
        ...

    @property
    def active_positions(self) -> list[int]:
        """Positions of the students, in the order of evaluation."""
        ...

    def steps(self, x: Tensor) -> Steps:
        """Begin a pass of images (B, in_chans, H, W)."""
        ...

    def step_macs(self, input_size: Sequence[int]) -> Sequence[int]:
        """Multiply-accumulates that each of the students adds, on an image of ``input_size``."""
        ...

    def combine(self, student_logits: Sequence[Tensor]) -> Tensor:
        """Ensemble logits (k, n, num_classes) after each of k students, from their own."""
        ...


_KNOWN: WeakKeyDictionary[Any, tuple[list[Any], dict[Any, Any]]] = WeakKeyDictionary()


def known(cascade: Cascade) -> dict[Any, Any]:
    """What has been found out about a cascade, to look up and add to; it is empty again once the parts are others."""
    parts = cascade.parts()
    if cascade not in _KNOWN or _KNOWN[cascade][0] != parts:
        _KNOWN[cascade] = parts, {}
    return _KNOWN[cascade][1]


class Run:
    """A prediction in progress, which policies look at after each student.

    Attributes:
        cascade: what runs.
        x: the images of the batch, (B, in_chans, H, W), those that have left included.
        k: students done.
        logits: ensemble logits (k, n, num_classes) after each of them, of the n images that are still there.
        macs: multiply-accumulates spent so far, on all images and on padding.
        next_macs: those that the next student takes for one image.
    """

    def __init__(self, cascade: Cascade, x: Tensor) -> None:
        self._began = time.perf_counter()
        self.cascade, self.x = cascade, x
        self.step_macs = cascade.step_macs(x.shape[1:])
        self.k, self.macs = 0, 0
        self.logits = x.new_empty(0)

    @property
    def next_macs(self) -> int:
        return self.step_macs[self.k]

    @property
    def seconds(self) -> float:
        """Seconds since the prediction began."""
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)
        return time.perf_counter() - self._began


@torch.no_grad()
def run_cascade(cascade: Cascade, x: Tensor, policy: Any, size: int | None = None) -> Prediction:
    """Predict images (B, in_chans, H, W), each with as many students as ``policy`` has it use.

    ``size``, B or more, is that of the batch which the first student gets; B if None.
    """
    run = Run(cascade, x)
    rest = torch.arange(len(x), device=x.device)
    size = len(x) if size is None else size  # of the batch that is computed, of which the first ones are the rest
    steps, positions = cascade.steps(torch.cat([x, x[:1].expand(size - len(x), -1, -1, -1)])), cascade.active_positions
    done: list[Tensor] = []
    found: list[tuple[Tensor, Tensor, int]] = []  # who left, with what logits, after how many students
    for k, position in enumerate(positions, start=1):
        done.append(steps.logits(position))
        run.k, run.macs, run.logits = k, run.macs + size * run.next_macs, cascade.combine(done)[:, : len(rest)]
        going_on = policy.going_on(run) if k < len(positions) else torch.zeros_like(rest, dtype=torch.bool)
        left = int(going_on.sum())
        if left == len(rest):
            continue
        if left == 0:
            found.append((rest, run.logits[-1], k))
            break
        indices, leaving = going_on.nonzero()[:, 0], going_on.logical_not().nonzero()[:, 0]
        found.append((rest[leaving], run.logits[-1][leaving], k))
        rest, size = rest[indices], min(padded(left), size)
        rows = torch.cat([indices, indices[:1].expand(size - left)])
        steps.keep(rows)
        done = [logits[rows] for logits in done]
    order = torch.cat([who for who, _, _ in found]).argsort()
    counts = torch.tensor([len(who) for who, _, _ in found], device=x.device)
    ks = torch.tensor([k for _, _, k in found], device=x.device)
    students = ks.repeat_interleave(counts)[order]
    return Prediction(torch.cat([logits for _, logits, _ in found])[order], students, run.macs)
