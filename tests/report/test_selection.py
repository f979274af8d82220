"""Selecting among measured candidates, against brute force on random tables, and what it promises."""

import dataclasses
import math
import random

import pytest
import torch

from timm_mamba_pkd.report import Candidate, Constraints, Table
from timm_mamba_pkd.report import selection as module

CASES = range(60)
NAMES = [field.name for field in dataclasses.fields(Constraints)]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(module, "RESAMPLES", 200)


def tighter(constraints: Constraints, choose: random.Random) -> Constraints:
    limits = {name: getattr(constraints, name) for name in NAMES}
    name = choose.choice(NAMES)
    if name == "min_accuracy":
        limits[name] = choose.uniform(limits[name] or 0, 100)
    else:
        limits[name] = choose.uniform(0.5, limits[name] or 4)
    return Constraints(**limits)


def measures(table: Table, i: int) -> list[float]:
    """Everything in which less is better, in plain Python."""
    predictions = table.candidates[i].predictions.tolist()
    wrong = sum(p != t for p, t in zip(predictions, table.targets.tolist(), strict=True))
    return [wrong, *table.candidates[i].costs]


def keeps(table: Table, i: int, constraints: Constraints) -> bool:
    wrong, *costs = measures(table, i)
    limits = [constraints.max_macs, constraints.max_params, constraints.max_memory, constraints.max_latency]
    accuracy = 100 * (len(table.targets) - wrong) / len(table.targets)
    within = all(limit is None or cost <= limit for cost, limit in zip(costs, limits, strict=True))
    return within and accuracy >= (constraints.min_accuracy or 0)


@pytest.mark.parametrize("seed", CASES)
def test_without_redundancy_it_is_brute_force(seed, random_table, random_constraints):
    """Those that keep the constraints and that no other such candidate dominates."""
    table, constraints = random_table(seed, min_disagreement=0), random_constraints(random.Random(seed))
    feasible = [i for i in range(len(table.candidates)) if keeps(table, i, constraints)]
    front = set()
    for j in feasible:
        own = measures(table, j)
        others = [measures(table, i) for i in feasible]
        if not any(o != own and all(a <= b for a, b in zip(o, own, strict=True)) for o in others):
            front.add(j)
    selection = table.select(constraints)
    assert set(selection.front) == front
    assert [v.status == "constraint" for v in selection.verdicts] == [
        i not in feasible for i in range(len(table.candidates))
    ]
    assert (selection.nearest is None) == bool(feasible)


@pytest.mark.parametrize("seed", CASES)
def test_what_is_redundant(seed, random_table, random_constraints):
    """The same front as by going through all subsets' one rule: kept unless a kept, cheaper one predicts the same."""
    table, constraints = random_table(seed), random_constraints(random.Random(seed))
    selection = table.select(constraints)
    brute = Table(table.candidates, table.targets, 0, table.seed).select(constraints).front
    assert set(selection.front) <= set(brute)
    assert [i for i in table.by_cost if i in selection.front] == selection.front
    if not brute:
        return
    best = max(brute, key=lambda i: (table.accuracies[i], -table.by_cost.index(i)))
    assert best in selection.front
    for j in brute:
        same = []
        for i in selection.front:
            differ = sum(
                a != b for a, b in zip(table.candidates[i].predictions, table.candidates[j].predictions, strict=True)
            )
            costs, limits = table.candidates[i].costs, table.candidates[j].costs
            cheaper = (*costs, i) < (*limits, j) and all(a <= b for a, b in zip(costs[:3], limits[:3], strict=True))
            if cheaper and costs[3] <= 1.1 * limits[3] and 100 * differ / len(table.targets) < table.min_disagreement:
                better = table.difference(j, i)[0] > 0
                same += [] if better else [i]
        verdict = selection.verdicts[j]
        assert (j in selection.front) == (j == best or not same)
        assert verdict.status == ("front" if j in selection.front else "redundant")
        if verdict.status == "redundant":
            assert verdict.because == same[0]


@pytest.mark.parametrize("seed", CASES)
def test_a_tighter_constraint_never_gives_a_better_accuracy(seed, random_table):
    table, choose = random_table(seed), random.Random(seed)
    constraints, best = Constraints(), math.inf
    for _ in range(6):
        front = table.select(constraints).front
        accuracy = max((table.accuracies[i] for i in front), default=-1)
        assert accuracy <= best
        everyone = [table.accuracies[i] for i in range(len(table.candidates)) if keeps(table, i, constraints)]
        assert accuracy == max(everyone, default=-1)
        constraints, best = tighter(constraints, choose), accuracy


@pytest.mark.parametrize("seed", CASES)
def test_reasons(seed, random_table, random_constraints):
    """Who is dropped is told for whom or for what, and the nearest miss is that of brute force."""
    table, constraints = random_table(seed), random_constraints(random.Random(seed))
    selection = table.select(constraints)
    for i, verdict in enumerate(selection.verdicts):
        assert (verdict.because is not None) == (verdict.status in ("dominated", "redundant"))
        assert bool(verdict.violations) == (verdict.status == "constraint")
        if verdict.status == "dominated" and verdict.because is not None:
            assert table.dominates(verdict.because, i) and table.pareto[verdict.because]
            assert keeps(table, verdict.because, constraints)
    if selection.nearest is not None:
        shares = []
        for i in range(len(table.candidates)):
            wrong, *costs = measures(table, i)
            limits = [getattr(constraints, name) for name in NAMES[:4]]
            own = [cost / limit - 1 for cost, limit in zip(costs, limits, strict=True) if limit]
            if constraints.min_accuracy:
                own.append(1 - 100 * (len(table.targets) - wrong) / len(table.targets) / constraints.min_accuracy)
            shares.append(max(own))
        assert shares[selection.nearest] == pytest.approx(min(shares))
        assert selection.verdicts[selection.nearest].violations[0].relative == pytest.approx(min(shares))


def make(name: str, wrong: list[int], macs: float, latency: float = 1.0, samples: int = 100) -> Candidate:
    predictions = torch.zeros(samples, dtype=torch.int64)
    predictions[wrong] = 1
    return Candidate(name, "model", macs, 1.0, 1.0, latency, predictions)


def status(candidates: list[Candidate], constraints: Constraints | None = None, min_disagreement: float = 2.0):
    targets = torch.zeros(len(candidates[0].predictions), dtype=torch.int64)
    selection = Table(candidates, targets, min_disagreement).select(constraints or Constraints())
    return [verdict.status for verdict in selection.verdicts]


def test_slightly_better_and_dearer_is_redundant_unless_it_is_the_best():
    pool = [make("a", [0, 1, 2], 1), make("b", [0, 1], 2), make("c", [], 3)]
    assert status(pool) == ["front", "redundant", "front"]
    assert status(pool[:2]) == ["front", "front"]
    assert status(pool, min_disagreement=1.0) == ["front", "front", "front"]
    assert status(pool, Constraints(min_accuracy=97.5)) == ["constraint", "front", "front"]  # for nobody's sake


def test_nothing_is_dropped_for_what_is_dropped():
    """b is as a, and c as b but not as a."""
    pool = [make("a", [0, 1, 2], 1), make("b", [0, 1], 2), make("c", [0], 3), make("d", [], 4)]
    assert status(pool) == ["front", "redundant", "front", "front"]


def test_significantly_better_is_no_redundancy():
    """One of a hundred differs, and on ten thousand samples that is significant."""
    pool = [
        make("a", list(range(300)), 1, samples=10_000),
        make("b", list(range(200)), 2, samples=10_000),
        make("c", [], 3, samples=10_000),
    ]
    assert status(pool, min_disagreement=1.5) == ["front", "front", "front"]
    few = [make("a", [0, 1, 2], 1), make("b", [0, 1], 2), make("c", [], 3)]
    assert status(few, min_disagreement=1.5) == ["front", "redundant", "front"]


def test_a_latency_within_the_noise_is_the_same():
    """An ensemble of one student is that student, whichever of them the clock favours."""
    for factor, expected in ((1.05, "redundant"), (0.95, "dominated"), (1.2, "front")):
        student, ensemble = make("s1", [0, 1], 1, latency=factor), make("ensemble_1", [0, 1], 1)
        ensemble = dataclasses.replace(ensemble, memory=1.01)
        assert status([student, ensemble]) == ["front", expected]


def test_intervals_are_the_bootstrap_s():
    """As of the binomial distribution that a bootstrap of an accuracy has; the difference is paired."""
    one, other = make("a", list(range(20)), 1), make("b", list(range(19)), 2)
    module.RESAMPLES = 4000
    table = Table([one, other], torch.zeros(100, dtype=torch.int64), seed=1)
    low, high = table.intervals[0]
    assert abs(low - 72) <= 1 and abs(high - 87) <= 1  # scipy.stats.binom(100, 0.8).ppf([0.025, 0.975])
    assert table.difference(1, 0) == (0, 3)  # binom(100, 0.01); unpaired it would be about (-10, 12)
    again = Table([one, other], torch.zeros(100, dtype=torch.int64), seed=1)
    assert again.intervals == table.intervals
    perfect = Table([make("c", [], 1)], torch.zeros(100, dtype=torch.int64))
    assert perfect.intervals == [(100, 100)]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_accuracy": 100.5}, "--min-accuracy 100.5 contradicts itself: an accuracy is from 0 to 100 percent"),
        ({"min_accuracy": -1}, "--min-accuracy -1 contradicts"),
        ({"min_accuracy": math.nan}, "--min-accuracy nan contradicts"),
        ({"max_macs": -1}, "--max-macs -1 contradicts itself: a limit must be above 0 and finite"),
        ({"max_params": 0}, "--max-params 0 contradicts"),
        ({"max_memory": math.inf}, "--max-memory inf contradicts"),
        ({"max_latency": math.nan}, "--max-latency nan contradicts"),
    ],
)
def test_constraints_that_contradict(limits, message):
    with pytest.raises(ValueError, match=message):
        Constraints(**limits)


def test_bad_tables():
    targets, one = torch.zeros(100, dtype=torch.int64), make("a", [], 1)
    for candidates, labels, share, message in [
        ([], targets, 1, "no candidates"),
        ([one], targets[:0], 1, "no samples"),
        ([one], targets[:5], 1, "a has predictions for other samples"),
        ([one, one], targets, 1, "two candidates have one name"),
        ([one], targets, 101, "--min-disagreement 101 is not from 0 to 100 percent"),
    ]:
        with pytest.raises(ValueError, match=message):
            Table(candidates, labels, share)
    with pytest.raises(ValueError, match="a: latency is nan, not a finite number from 0"):
        dataclasses.replace(one, latency=math.nan)
