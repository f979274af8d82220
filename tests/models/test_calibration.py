"""Fitting early exit against independent minimisers and loops."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from timm_mamba_pkd.models.calibration import LARGEST_TEMPERATURE, exits, fit_temperatures, trade_off


def cross_entropy(logits: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.double() / temperature, targets)


def make_logits(seed: int, count: int, classes: int, scale: float) -> tuple[Tensor, Tensor]:
    """Logits (2, n, C) that say something about the targets, and are too sure or not sure enough."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(2, count, classes, generator=generator)
    logits += 1.5 * torch.nn.functional.one_hot(targets, classes)
    return scale * logits, targets


@pytest.mark.parametrize(("classes", "scale"), [(2, 0.3), (3, 1.0), (10, 5.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_temperatures_as_by_lbfgs(classes, scale, seed):
    logits, targets = make_logits(seed, 200, classes, scale)
    found = fit_temperatures(logits, targets)
    for one, temperature in zip(logits, found, strict=True):
        log = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([log], tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")

        def closure(one: Tensor = one, log: Tensor = log, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(one, targets, log.exp())
            loss.backward()
            return loss

        optimizer.step(closure)
        assert temperature == pytest.approx(log.exp().item(), rel=1e-4)


def test_temperatures_as_on_a_grid():
    """Also where there are no more than three images, with a class that never comes."""
    grid = torch.logspace(-1.3, 1.3, 4001, dtype=torch.float64)
    for seed in range(10):
        logits, targets = make_logits(seed, 3, 4, 2.0)
        for one, temperature in zip(logits, fit_temperatures(logits, targets), strict=True):
            losses = [cross_entropy(one, targets, value).item() for value in grid]
            loss = cross_entropy(one, targets, torch.tensor(temperature)).item()
            assert 1 / LARGEST_TEMPERATURE - 1e-9 <= temperature <= LARGEST_TEMPERATURE + 1e-9
            assert loss <= min(losses) + 1e-9


def test_temperatures_at_their_bounds():
    """Of separable data the smallest, of data that are always wrong the largest; a single image, a single class."""
    targets = torch.tensor([0, 1, 2])
    right = torch.eye(3)
    logits = torch.stack([right, -right, 1e4 * right, 1e-6 * right, -1e4 * right])
    smallest, largest = 1 / LARGEST_TEMPERATURE, LARGEST_TEMPERATURE
    found = fit_temperatures(logits, targets)
    assert found == pytest.approx([smallest, largest, found[2], smallest, largest])
    assert smallest <= found[2] < largest  # its cross-entropy is 0 at any
    assert fit_temperatures(logits[:2, :1], targets[:1]) == pytest.approx([smallest, largest])
    alone = fit_temperatures(torch.randn(1, 4, 1), torch.zeros(4, dtype=torch.int64))
    assert smallest <= alone[0] <= largest


def make_table(seed: int, students: int, count: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Confidences with many ties, classes and targets."""
    choose = random.Random(seed)
    levels = [0.0, 0.25, 0.5, 0.5000001, 0.75, 1.0]

    def sure() -> float:
        return choose.choice(levels) if choose.random() < 0.6 else choose.random()

    confidences = torch.tensor([[sure() for _ in range(count)] for _ in range(students)])
    targets = torch.tensor([choose.randrange(3) for _ in range(count)])
    classes = torch.tensor([[choose.choice([int(t), choose.randrange(3)]) for t in targets] for _ in range(students)])
    return confidences, classes, targets, [choose.randint(1, 9) for _ in range(students)]


def left_after(sure: Tensor, image: int, threshold: float) -> int:
    """After which student, from 0, an image leaves: one at a time."""
    for k in range(len(sure) - 1):
        if sure[k, image].item() > threshold:
            return k
    return len(sure) - 1


TABLES = [(students, count) for students in (2, 3, 5) for count in (1, 2, 30)]


@pytest.mark.parametrize(("students", "count"), TABLES)
@pytest.mark.parametrize("seed", range(4))
def test_trade_off_as_by_a_loop(students, count, seed):
    sure, classes, targets, step_macs = make_table(seed, students, count)
    points = trade_off(sure, classes, targets, step_macs)
    labels, said = targets.tolist(), classes.tolist()
    wanted = set()
    for threshold in {0.0, 1.0, *sure[:-1].flatten().tolist()}:
        at = [left_after(sure, i, threshold) for i in range(count)]
        right = sum(said[k][i] == labels[i] for i, k in enumerate(at)) / count
        same = sum(said[k][i] == said[-1][i] for i, k in enumerate(at)) / count
        macs = sum(sum(step_macs[: k + 1]) for k in at) / count
        wanted.add((round(right, 9), round(same, 9), round(macs, 9)))
    found = [(round(p.accuracy, 9), round(p.agreement, 9), round(p.macs, 9)) for p in points]
    assert set(found) == wanted
    for point in points:
        at = torch.tensor([left_after(sure, i, point.threshold) for i in range(count)])
        assert torch.equal(exits(sure, point.threshold), at)
        assert point.macs == pytest.approx(torch.tensor(step_macs).cumsum(0)[at].double().mean().item())
    assert points[-1].macs == sum(step_macs) and points[-1].agreement == 1
    assert points[-1].threshold == 1
    assert not set(sure.double().flatten().tolist()) & {point.threshold for point in points[1:-1]}
    for cheap, dear in itertools.pairwise(points):
        assert cheap.macs < dear.macs and cheap.threshold < dear.threshold


def test_students_that_are_all_alike():
    """Nobody is ever sure, or everybody: two cascades."""
    classes = torch.zeros(3, 4, dtype=torch.int64)
    for value in (0.0, 0.5, 1.0):
        points = trade_off(torch.full((3, 4), value), classes, classes[0], [1, 2, 4])
        assert [point.macs for point in points] == ([7] if value == 0 else [1, 7])
        assert all(point.accuracy == point.agreement == 1 for point in points)


def test_of_many_levels_some_are_tried():
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(3, 2000, generator=generator)
    classes = torch.randint(3, (3, 2000), generator=generator)
    points = trade_off(sure, classes, classes[-1], [1, 2, 4], most=50)
    assert 40 <= len(points) <= 50
    assert points[0].macs < 1.1 and points[-1].macs == 7
    assert all(len(trade_off(sure, classes, classes[-1], [1, 2, 4], most)) <= most for most in (2, 3, 999))


def test_exits_are_those_above_the_threshold():
    sure = torch.tensor([[0.5, 0.9, 0.1, 0.7], [0.99, 0.0, 0.7, 0.7], [0.0, 0.0, 0.0, 0.0]])
    assert exits(sure, 0.7).tolist() == [1, 0, 2, 2]
    assert exits(sure, 0.0).tolist() == [0, 0, 0, 0]
    assert exits(sure, 1.0).tolist() == [2, 2, 2, 2]
    assert exits(sure[:1], 0.7).tolist() == [0, 0, 0, 0]
