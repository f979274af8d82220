"""Random tables of candidates."""

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch

from timm_mamba_pkd.report import Candidate, Constraints, Table
from timm_mamba_pkd.report.selection import COSTS

NAMES = [field.name for field in dataclasses.fields(Constraints)]


def make_table(seed: int, min_disagreement: float | None = None) -> Table:
    """Up to 12 candidates on up to 120 samples of 3 classes, with ties in costs and in predictions."""
    choose = random.Random(seed)
    count = choose.choice([1, 2, 7, 40, 120])
    targets = torch.tensor([choose.randrange(3) for _ in range(count)])
    candidates: list[Candidate] = []
    for i in range(choose.randint(1, 12)):
        if candidates and choose.random() < 0.5:
            predictions = choose.choice(candidates).predictions.clone()
            for _ in range(choose.randint(0, 3)):
                predictions[choose.randrange(count)] = choose.randrange(3)
        else:
            skill = choose.random()
            predictions = [int(t) if choose.random() < skill else choose.randrange(3) for t in targets]
        costs = [choose.choice([1, 2, 3, choose.uniform(0.5, 4)]) for _ in COSTS]
        candidates.append(Candidate(f"c{i}", "model", *costs, predictions=torch.as_tensor(predictions)))
    if min_disagreement is None:
        min_disagreement = choose.choice([0, 1, 3, 10, 100])
    return Table(candidates, targets, min_disagreement, seed)


def make_constraints(choose: random.Random) -> Constraints:
    limits = {name: choose.uniform(0.6, 4) if name != "min_accuracy" else choose.uniform(0, 90) for name in NAMES}
    return Constraints(**{name: limit for name, limit in limits.items() if choose.random() < 0.4})


@pytest.fixture
def random_table() -> Callable[..., Table]:
    return make_table


@pytest.fixture
def random_constraints() -> Callable[[random.Random], Constraints]:
    return make_constraints
