"""How far a classifier's confidence can be trusted: calibration, and prediction of failures."""

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence is within one of `BINS` equal parts of 0 to 1.

    Attributes:
        count: how many.
        confidence: their mean confidence.
        accuracy: share of them that are right.
    """

    count: int
    confidence: float
    accuracy: float


def reliability(sure: Tensor, right: Tensor) -> list[Bin]:
    """The bins of a reliability diagram that hold predictions, in order.

    Args:
        sure: confidences (n,) from 0 to 1.
        right: bool (n,).
    """
    index = (sure * BINS).ceil().long().clamp(1, BINS)  # bins are open below, as in arXiv 1706.04599
    return [
        Bin(int(inside.sum()), float(sure[inside].double().mean()), float(right[inside].double().mean()))
        for number in range(1, BINS + 1)
        if bool((inside := index == number).any())
    ]


def expected_calibration_error(bins: list[Bin]) -> float:
    """ECE (arXiv 1706.04599, eq. 3): the mean distance of accuracy and confidence over the predictions of all bins."""
    return sum(part.count * abs(part.accuracy - part.confidence) for part in bins) / sum(part.count for part in bins)


def auroc_of_failure(sure: Tensor, right: Tensor) -> float | None:
    """How well confidence tells failures: the share of pairs of a right and a wrong prediction, in which the right one
    is surer; ties count half. None where all are right, or all wrong.

    Args:
        sure: confidences (n,).
        right: bool (n,).
    """
    good, bad = sure[right], sure[~right].sort().values
    if not len(good) or not len(bad):
        return None
    below = torch.searchsorted(bad, good) + torch.searchsorted(bad, good, right=True)
    return float(below.double().mean() / 2 / len(bad))
