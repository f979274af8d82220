"""Fitting the policy `Confidence` to held-out data: temperatures, and thresholds that trade errors for compute."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_TEMPERATURE = 20.0  # and its inverse is the smallest


def fit_temperatures(logits: Tensor, targets: Tensor) -> list[float]:
    """Temperatures (N) that minimise the cross-entropy of logits divided by them (arXiv 1706.04599).

    The cross-entropy is convex in the inverse temperature, so its slope is bisected; float64.

    Args:
        logits: (N, n, C), of N classifiers.
        targets: int64 labels (n,).
    """
    logits = logits.double()
    of_target = logits.gather(-1, targets.expand(len(logits), -1)[..., None])[..., 0]
    low = torch.full_like(logits[:, 0, 0], LARGEST_TEMPERATURE).log().neg()
    high = -low
    for _ in range(50):
        middle = (low + high) / 2
        probs = (logits * middle.exp()[:, None, None]).softmax(-1)
        slope = ((probs * logits).sum(-1) - of_target).mean(-1)
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    return (-(low + high) / 2).exp().tolist()


@dataclass(frozen=True)
class Point:
    """A cascade in which an image leaves as soon as it is surer than ``threshold``, on the samples it was tried on.

    Attributes:
        threshold: of the confidence after every student but the last.
        accuracy: share of the images that are predicted right.
        agreement: share of the images that are predicted as by all students together.
        macs: average multiply-accumulates of an image.
    """

    threshold: float
    accuracy: float
    agreement: float
    macs: float


def trade_off(
    sure: Tensor, classes: Tensor, targets: Tensor, step_macs: Sequence[int], most: int = 1000
) -> list[Point]:
    """Cascades from the cheapest to the one in which nobody leaves early.

    All students share one threshold of the calibrated confidence. With a threshold for each the samples would have to
    tell as many numbers apart, and on other samples it did worse: twice the loss of accuracy on MNIST.

    Args:
        sure: confidences (N, n) of the ensemble after each of N students, by its temperature.
        classes: what it predicts, int64 (N, n).
        targets: int64 labels (n,).
        step_macs: multiply-accumulates that each student adds, (N).
        most: so many thresholds at most, quantiles of those between the confidences where there are more of these.
    """
    costs = torch.tensor(step_macs, dtype=torch.float64).cumsum(0)
    levels = torch.cat([torch.zeros(1), sure[:-1].flatten(), torch.ones(1)]).double().unique()
    levels[1:-1] = (levels[1:-1] + levels[2:]) / 2  # on a confidence, rounding would decide, which differs with batches
    if len(levels) > most:
        levels = levels[torch.linspace(0, len(levels) - 1, most).long()]
    right, agrees = (classes == targets).double(), (classes == classes[-1]).double()
    points = {}
    for level in levels.tolist():
        at = exits(sure, level)[None]
        accuracy, agreement = (float(found.gather(0, at).mean()) for found in (right, agrees))
        points[at.sum().item()] = Point(level, accuracy, agreement, float(costs[at].mean()))
    return list(points.values())


def exits(sure: Tensor, threshold: float) -> Tensor:
    """After which student, from 0, each image leaves, int64 (n,), by confidences (N, n)."""
    leaves = sure.double() > threshold
    leaves[-1] = True
    return leaves.int().argmax(0)
