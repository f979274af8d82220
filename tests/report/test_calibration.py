"""Calibration and prediction of failures against plain loops and scikit-learn."""

import math
import random

import pytest
import torch
from sklearn.metrics import roc_auc_score

from timm_mamba_pkd.report.calibration import BINS, auroc_of_failure, expected_calibration_error, reliability


def make(seed: int, count: int, steps: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences, in so many steps or in none, and whether the predictions are right."""
    choose = random.Random(seed)
    sure = [choose.randint(0, steps) / steps if steps else choose.random() for _ in range(count)]
    return torch.tensor(sure), torch.tensor([choose.random() < value for value in sure])


@pytest.mark.parametrize("count", [1, 2, 15, 400])
@pytest.mark.parametrize("seed", range(5))
def test_bins_and_error_as_by_a_loop(seed, count):
    sure, right = make(seed, count)
    wanted, error = [], 0.0
    for number in range(BINS):
        inside = [i for i in range(count) if number / BINS < sure[i].item() <= (number + 1) / BINS]
        if inside:
            mean = math.fsum(sure[i].item() for i in inside) / len(inside)
            share = sum(bool(right[i]) for i in inside) / len(inside)
            wanted.append((len(inside), mean, share))
            error += len(inside) / count * abs(mean - share)
    bins = reliability(sure, right)
    assert [part.count for part in bins] == [size for size, _, _ in wanted]
    assert [part.confidence for part in bins] == pytest.approx([mean for _, mean, _ in wanted])
    assert [part.accuracy for part in bins] == pytest.approx([share for _, _, share in wanted])
    assert expected_calibration_error(bins) == pytest.approx(error)


def test_the_ends_belong_to_the_first_and_the_last_bin():
    bins = reliability(torch.tensor([0.0, 0.01, 1.0, 1.0]), torch.tensor([False, True, True, False]))
    assert [(part.count, part.accuracy) for part in bins] == [(2, 0.5), (2, 0.5)]
    assert [part.confidence for part in bins] == pytest.approx([0.005, 1])
    assert expected_calibration_error(bins) == pytest.approx(0.4975)
    assert expected_calibration_error(reliability(torch.ones(3), torch.ones(3).bool())) == 0
    assert expected_calibration_error(reliability(torch.ones(3), torch.zeros(3).bool())) == 1


@pytest.mark.parametrize("steps", [0, 1, 3, 20])  # of few steps most pairs are ties
@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_that_of_scikit_learn(seed, steps):
    sure, right = make(seed, 60, steps)
    right[:2] = torch.tensor([True, False])
    assert auroc_of_failure(sure, right) == pytest.approx(roc_auc_score(right.numpy(), sure.numpy()))


def test_auroc_at_its_ends():
    sure = torch.tensor([0.1, 0.2, 0.8, 0.9])
    assert auroc_of_failure(sure, sure > 0.5) == 1
    assert auroc_of_failure(sure, sure < 0.5) == 0
    assert auroc_of_failure(torch.ones(4), sure < 0.5) == 0.5
    assert auroc_of_failure(sure, torch.ones(4).bool()) is None
    assert auroc_of_failure(sure, torch.zeros(4).bool()) is None
