"""Which of many measured candidates to take under constraints: the Pareto front without what is no choice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from timm_mamba_pkd.report.table import significant

COSTS = ("macs", "params", "memory", "latency")
UNITS = {"accuracy": "%", "macs": "M", "params": "M", "memory": "MiB", "latency": "ms"}
LATENCY_NOISE = 0.1  # share by which two latencies may differ and still count as equal in `Table.same_as`
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Candidate:
    """What was measured of one candidate.

    Attributes:
        name: its own among the candidates.
        kind: what it is: "student", "ensemble", "cascade", "teacher", "model", ...
        macs: millions of multiply-accumulates per image; of a cascade the mean.
        params: millions of parameters.
        memory: MiB that PyTorch holds at most while one image passes, weights included.
        latency: milliseconds per image at batch size 1; of a cascade the mean.
        predictions: the class of each sample, int64 (N,), the samples in the same order for all candidates.

    Raises:
        ValueError: a cost is negative or not finite.
    """

    name: str
    kind: str
    macs: float
    params: float
    memory: float
    latency: float
    predictions: Tensor

    def __post_init__(self):
        for cost in COSTS:
            if not 0 <= getattr(self, cost) < math.inf:
                raise ValueError(f"{self.name}: {cost} is {getattr(self, cost)}, not a finite number from 0")

    @property
    def costs(self) -> tuple[float, ...]:
        return tuple(getattr(self, cost) for cost in COSTS)


@dataclass(frozen=True)
class Constraints:
    """Limits that a candidate must keep, in the units of `Candidate` and in percent; None is no limit.

    Raises:
        ValueError: nothing could ever keep one of them.
    """

    max_macs: float | None = None
    max_params: float | None = None
    max_memory: float | None = None
    max_latency: float | None = None
    min_accuracy: float | None = None

    def __post_init__(self):
        for name, limit in self.given().items():
            flag = f"--{name.replace('_', '-')}"
            if name == "min_accuracy" and not 0 <= limit <= 100:
                raise ValueError(f"{flag} {limit:g} contradicts itself: an accuracy is from 0 to 100 percent")
            if name != "min_accuracy" and not 0 < limit < math.inf:
                raise ValueError(f"{flag} {limit:g} contradicts itself: a limit must be above 0 and finite")

    def given(self) -> dict[str, float]:
        """The limits that there are, by name."""
        limits = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True)
class Violation:
    """A constraint that a candidate breaks.

    Attributes:
        constraint: its name, as in `Constraints`.
        limit, value: what is asked for and what was measured.
        relative: by how much the value is off, as a share of the limit.
    """

    constraint: str
    limit: float
    value: float
    relative: float

    def __str__(self) -> str:
        flag = f"--{self.constraint.replace('_', '-')} {self.limit:g}"
        if self.constraint == "min_accuracy":
            return f"{significant(self.limit - self.value)} points below {flag}"
        return f"{significant(100 * self.relative)} % above {flag}"


@dataclass(frozen=True)
class Verdict:
    """What becomes of a candidate: on the front, or why not.

    Attributes:
        status: "front", "constraint" (it breaks one), "dominated" or "redundant".
        because: the position of the candidate that dominates it, or predicts the same for less; None otherwise.
        violations: of constraints, the worst first.
    """

    status: str
    because: int | None = None
    violations: tuple[Violation, ...] = ()


@dataclass(frozen=True)
class Selection:
    """The answer of `Table.select`.

    Attributes:
        verdicts: one per candidate, in their order.
        front: positions of the candidates to choose from, the cheapest first.
        nearest: where nothing fits, the position of the candidate whose worst violation is smallest; None otherwise.
    """

    verdicts: list[Verdict]
    front: list[int]
    nearest: int | None


class Table:
    """Candidates, compared with one another on the same labelled samples.

    Accuracies have percentile intervals of a bootstrap over the samples, and so do differences of two accuracies: every
    resample is the same for all candidates. A candidate without an error has the interval [100, 100].

    Args:
        candidates: at least one, with different names.
        targets: the classes of the samples, int64 (N,).
        min_disagreement: percent of the samples on which a candidate must predict otherwise than a cheaper one to be a
            choice of its own; 0 for no such demand.
        seed: of the bootstrap.

    Raises:
        ValueError: no candidates or samples, predictions for other samples, two of one name, or a share out of range.
    """

    def __init__(
        self, candidates: Sequence[Candidate], targets: Tensor, min_disagreement: float = 1.0, seed: int = 42
    ) -> None:
        if not candidates:
            raise ValueError("there are no candidates")
        if not len(targets):
            raise ValueError("there are no samples")
        if not 0 <= min_disagreement <= 100:
            raise ValueError(f"--min-disagreement {min_disagreement:g} is not from 0 to 100 percent")
        names = [candidate.name for candidate in candidates]
        if len(set(names)) < len(names):
            raise ValueError(f"two candidates have one name: {', '.join(names)}")
        for candidate in candidates:
            if candidate.predictions.shape != targets.shape:
                raise ValueError(f"{candidate.name} has predictions for other samples")
        self.candidates = list(candidates)
        self.targets = targets
        self.min_disagreement = min_disagreement
        self.seed = seed
        self._predictions = torch.stack([candidate.predictions for candidate in candidates])
        self._correct = (self._predictions == targets).double()

    @cached_property
    def accuracies(self) -> list[float]:
        """Top-1 in percent."""
        return (100 * self._correct.sum(-1) / len(self.targets)).tolist()

    @cached_property
    def _resampled(self) -> Tensor:
        """Accuracies on each resample: (candidates, `RESAMPLES`)."""
        generator, count = torch.Generator().manual_seed(self.seed), len(self.targets)
        columns = []
        for _ in range(RESAMPLES):
            drawn = torch.randint(count, (count,), generator=generator)
            columns.append(self._correct @ torch.bincount(drawn, minlength=count).double())
        return 100 * torch.stack(columns, dim=-1) / count

    @cached_property
    def intervals(self) -> list[tuple[float, float]]:
        """Of each accuracy, in percent, with `CONFIDENCE`."""
        return [_interval(row) for row in self._resampled]

    def difference(self, i: int, j: int) -> tuple[float, float]:
        """The interval of the accuracy of candidate ``i`` minus that of ``j``, in points, paired."""
        return _interval(self._resampled[i] - self._resampled[j])

    def disagreement(self, i: int, j: int) -> float:
        """Percent of the samples for which two candidates predict different classes."""
        return 100 * float((self._predictions[i] != self._predictions[j]).double().mean())

    @cached_property
    def by_cost(self) -> list[int]:
        """Positions, the cheapest first: fewest MACs, then parameters, memory, latency, then in the order given."""
        return sorted(range(len(self.candidates)), key=lambda i: self.candidates[i].costs)

    def dominates(self, i: int, j: int) -> bool:
        """Whether ``i`` is as accurate as ``j`` or more and costs no more of anything, and is better in something."""
        one, other = self._merits(i), self._merits(j)
        return one != other and all(a >= b for a, b in zip(one, other, strict=True))

    def _merits(self, i: int) -> tuple[float, ...]:
        return (self.accuracies[i], *(-cost for cost in self.candidates[i].costs))

    @cached_property
    def pareto(self) -> list[bool]:
        """Whether nothing dominates a candidate."""
        count = range(len(self.candidates))
        return [not any(self.dominates(i, j) for i in count) for j in count]

    @cached_property
    def same_as(self) -> list[list[int]]:
        """For each candidate the cheaper ones that predict the same, the cheapest first.

        The cheaper one comes first in `by_cost` and costs no more of anything (latencies within `LATENCY_NOISE` are
        equal), they differ on less than ``min_disagreement``, and the dearer one is not significantly more accurate:
        the interval of the difference is not above 0.
        """
        found: list[list[int]] = [[] for _ in self.candidates]
        for position, j in enumerate(self.by_cost):
            for i in self.by_cost[:position]:
                limits = [*self.candidates[j].costs[:-1], (1 + LATENCY_NOISE) * self.candidates[j].latency]
                if (
                    all(a <= b for a, b in zip(self.candidates[i].costs, limits, strict=True))
                    and self.disagreement(i, j) < self.min_disagreement
                    and self.difference(j, i)[0] <= 0
                ):
                    found[j].append(i)
        return found

    def violations(self, i: int, constraints: Constraints) -> tuple[Violation, ...]:
        """The constraints that a candidate breaks, the worst first: by the relative difference from the limit."""
        found = []
        for name, limit in constraints.given().items():
            quantity = name[4:]
            value = self.accuracies[i] if quantity == "accuracy" else getattr(self.candidates[i], quantity)
            excess = limit - value if quantity == "accuracy" else value - limit
            if excess > 0:
                found.append(Violation(name, limit, value, excess / limit))
        return tuple(sorted(found, key=lambda violation: -violation.relative))

    def select(self, constraints: Constraints) -> Selection:
        """The candidates that keep the constraints, less those that are dominated, less those that are redundant.

        Redundant is one that predicts the same as a cheaper one (`same_as`) which is on the front itself. It is decided
        in the order of the costs, so that nothing is dropped in favour of what is dropped. The most accurate candidate
        that keeps the constraints is never redundant (of several the first in `by_cost`): so the best accuracy on the
        front is that of all candidates that keep the constraints, and tighter constraints, which fewer keep, cannot
        raise it. What dominates a candidate keeps every constraint that it keeps, so it does not matter whether
        constraints or dominated ones come first.

        When nothing keeps the constraints, the nearest is the candidate whose largest relative violation is smallest;
        of several that with the smallest sum of them, then the first in `by_cost`.
        """
        violations = [self.violations(i, constraints) for i in range(len(self.candidates))]
        left = [i for i in self.by_cost if not violations[i] and self.pareto[i]]
        best = max(left, key=lambda i: self.accuracies[i], default=None)
        front: list[int] = []
        for i in left:
            if i == best or not set(self.same_as[i]) & set(front):
                front.append(i)
        verdicts = [self._verdict(i, violations[i], front) for i in range(len(self.candidates))]
        nearest = None
        if best is None:
            nearest = min(
                self.by_cost, key=lambda i: (violations[i][0].relative, sum(v.relative for v in violations[i]))
            )
        return Selection(verdicts, front, nearest)

    def _verdict(self, i: int, violations: tuple[Violation, ...], front: list[int]) -> Verdict:
        if violations:
            return Verdict("constraint", violations=violations)
        if i in front:
            return Verdict("front")
        if self.pareto[i]:
            return Verdict("redundant", because=next(j for j in self.same_as[i] if j in front))
        above = [j for j in self.by_cost if self.pareto[j] and self.dominates(j, i)]
        return Verdict("dominated", because=next((j for j in above if j in front), above[0]))


def _interval(values: Tensor) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return low, high
