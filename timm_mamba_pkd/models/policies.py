"""Policies of `MambaPKDEnsemble.predict`: which images leave an ensemble before its last student."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from timm_mamba_pkd.models.arguments import check_count
from timm_mamba_pkd.models.cascade import Cascade, Prediction, Run, known, padded, run_cascade

MEASURES = ("max_prob", "margin", "entropy")


def confidence(logits: Tensor, measure: str = "max_prob", temperature: float = 1.0) -> Tensor:
    """Confidence (...) from 0 to 1, float32, of logits (..., C).

    Args:
        logits: float, of any precision.
        measure: 'max_prob', the largest probability; 'margin', by how much it is above the second; or 'entropy', 1 less
            the entropy's share of log C.
        temperature: the logits are divided by it (arXiv 1706.04599).
    """
    scaled = logits.float() / temperature
    if logits.shape[-1] == 1:
        return torch.ones_like(scaled[..., 0])
    if measure == "entropy":
        log_probs = scaled.log_softmax(-1)
        return 1 + (log_probs.exp() * log_probs).sum(-1) / math.log(logits.shape[-1])
    first, second = scaled.softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second if measure == "margin" else first


class Policy(Protocol):
    """Decides after each student but the last which images go on to the next."""

    def start(self, cascade: Cascade, x: Tensor) -> None:
        """Raise a ValueError, before anything is computed, if the policy cannot serve images ``x``, (B, C, H, W)."""
        ...

    def going_on(self, run: Run) -> Tensor:
        """Which of the images that are still there go on, bool (n,)."""
        ...


def predict(cascade: Cascade, x: Tensor, policy: Any) -> Prediction:
    """Predict images (B, in_chans, H, W), each with as many students as ``policy`` has it use.

    Raises:
        ValueError: there is no policy, or it cannot serve this cascade or batch.
    """
    if policy is None:
        raise ValueError("there is no policy: fit one by mamba-pkd calibrate, or give one")
    if isinstance(policy, type) or not hasattr(policy, "going_on"):
        raise ValueError(f"policy must be a Confidence, Agreement, Budget or Depth, got {policy!r}")
    policy.start(cascade, x)
    in_time = isinstance(policy, Budget) and policy.milliseconds is not None
    return run_cascade(cascade, x, policy, padded(len(x)) if in_time else None)


@dataclass(frozen=True)
class Depth:
    """Every image uses the first ``k`` students.

    Raises:
        ValueError: ``k`` is no whole number from 1 to the number of students.
    """

    k: int

    def __post_init__(self) -> None:
        check_count("k", self.k, 1)

    def start(self, cascade: Cascade, x: Tensor) -> None:
        check_count("k", self.k, 1, len(cascade.active_positions))

    def going_on(self, run: Run) -> Tensor:
        return torch.full(run.logits.shape[1:2], run.k < self.k, device=run.logits.device)


@dataclass(frozen=True)
class Agreement:
    """An image leaves when as many ensembles as ``patience`` in a row have predicted what the one before them did.

    Patience-based early exit (arXiv 2006.04152), with the ensembles after k students as classifiers.

    Raises:
        ValueError: ``patience`` is no whole number from 1.
    """

    patience: int = 1

    def __post_init__(self) -> None:
        check_count("patience", self.patience, 1)

    def start(self, cascade: Cascade, x: Tensor) -> None:
        pass

    def going_on(self, run: Run) -> Tensor:
        if run.k <= self.patience:
            return torch.ones(run.logits.shape[1], dtype=torch.bool, device=run.logits.device)
        classes = run.logits[-self.patience - 1 :].argmax(-1)
        return (classes != classes[:1]).any(0)


class Confidence(nn.Module):
    """An image leaves after k students if the confidence of the ensemble after k is above the threshold of k.

    As an ensemble's ``policy`` it is part of the state dict, in full precision whatever the dtype of the weights. Of
    fewer active students, if they are the first ones, the first thresholds and temperatures count.

    Args:
        thresholds: (N - 1), one for each student but the last, from 0 to 1; at 1 nobody leaves. A sequence or tensor.
        temperatures: (N), likewise, of the ensemble after each student; ones if None.
        measure: of `confidence`.

    Raises:
        ValueError: a threshold, temperature or measure is out of range or no number, these are in no order, or the
            number of students is another.
    """

    def __init__(
        self,
        thresholds: Sequence[float] | Tensor,
        temperatures: Sequence[float] | Tensor | None = None,
        measure: str = "max_prob",
    ) -> None:
        super().__init__()
        self.thresholds = tuple(
            _numbers("thresholds", thresholds, lambda value: 0 <= value <= 1, "numbers from 0 to 1")
        )
        count = len(self.thresholds) + 1
        temperatures = (1.0,) * count if temperatures is None else temperatures
        self.temperatures = tuple(_numbers("temperatures", temperatures, lambda value: value > 0, "numbers above 0"))
        if len(self.temperatures) != count:
            raise ValueError(
                f"{len(self.thresholds)} thresholds are for {count} students, but there are "
                f"{len(self.temperatures)} temperatures"
            )
        if measure not in MEASURES:
            raise ValueError(f"measure must be {', '.join(MEASURES[:-1])} or {MEASURES[-1]}, got {measure!r}")
        self.measure = measure

    def start(self, cascade: Cascade, x: Tensor) -> None:
        fitted, active = len(self.temperatures), cascade.active_positions
        if len(active) > fitted or active != list(range(len(active))):
            names = ", ".join(str(position + 1) for position in active)
            raise ValueError(f"the thresholds are for the first {fitted} students, and {names} are active: fit others")

    def going_on(self, run: Run) -> Tensor:
        k = run.k - 1
        return ~(confidence(run.logits[-1], self.measure, self.temperatures[k]) > self.thresholds[k])  # NaN goes on

    def first(self, k: int) -> "Confidence":
        """The policy of the first ``k`` students.

        Raises:
            ValueError: there are not so many.
        """
        check_count("k", k, 1, len(self.temperatures))
        return Confidence(self.thresholds[: k - 1], self.temperatures[:k], self.measure)

    @staticmethod
    def from_state_dict(state_dict: dict[str, Any], prefix: str = "") -> "Confidence":
        """The policy that a state dict holds.

        Raises:
            ValueError: it holds a part of one only, or values out of range.
        """
        found: list[Any] = [state_dict.get(prefix + name) for name in _STATE]
        if any(tensor is None for tensor in found) or found[2].numel() != 1:
            raise ValueError(f"it must consist of {', '.join(prefix + name for name in _STATE)}")
        index = int(found[2])
        measure = MEASURES[index] if 0 <= index < len(MEASURES) else f"number {index}"
        return Confidence(found[0].tolist(), found[1].tolist(), measure)

    def extra_repr(self) -> str:
        return f"thresholds={self.thresholds}, temperatures={self.temperatures}, measure={self.measure!r}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}thresholds"] = torch.tensor(self.thresholds, dtype=torch.float64)
        destination[f"{prefix}temperatures"] = torch.tensor(self.temperatures, dtype=torch.float64)
        destination[f"{prefix}measure"] = torch.tensor(MEASURES.index(self.measure))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        new = Confidence.from_state_dict(state_dict, prefix)
        self.thresholds, self.temperatures, self.measure = new.thresholds, new.temperatures, new.measure


_STATE = ("thresholds", "temperatures", "measure")


@dataclass(frozen=True)
class Budget:
    """The batch takes no more than so many multiply-accumulates, or milliseconds, in all.

    As many images as the rest of the budget allows, in batches of the sizes of `padded`, go on to the next student,
    those whose largest probability is smallest first. For milliseconds, which are counted from the call of ``predict``,
    the first batch is padded as well, and the students must have been timed on batches of these sizes: call `measure`
    once before. A student is taken to need twice its slowest run.

    Raises:
        ValueError: not one of the two is given, or it is not above 0; in ``predict``: it does not suffice for the first
            student, or the students have not been timed on such batches.
    """

    macs: float | None = None
    milliseconds: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.macs, self.milliseconds) if value is not None]
        if len(given) != 1:
            raise ValueError("a budget is either macs or milliseconds: give one of them")
        _numbers("a budget", given, lambda value: value > 0, "a number above 0")

    @staticmethod
    def measure(cascade: Any, x: Tensor) -> None:
        """Time the students of an ensemble or `OnnxCascade` on batches of up to B images like ``x``, (B, C, H, W).

        Takes about a second for each of the sizes 1, 2, 3, 4, 6, 8, 12, ... up to the first that holds B, at most; once
        for an ensemble, size and type of images, device, number of threads, autocast and process. Nothing else should
        run meanwhile. Students whose modules were replaced, or that were compiled, are timed anew. Another memory
        format, hooks, and modules compiled or changed in place go unnoticed: then time a deepcopy, of which nothing is
        known yet.

        Raises:
            ValueError: as ``predict``.
        """
        cascade.predict(x[:1], Depth(1))
        known = _times(cascade, x)
        for size in _sizes(padded(len(x))):
            if size not in known:
                if not known:
                    run_cascade(cascade, x[:size], _Watch())  # what is made once and for all does not count
                known[size] = _slowest_steps(cascade, x[torch.arange(size, device=x.device) % len(x)])

    def start(self, cascade: Cascade, x: Tensor) -> None:
        budget: Any = self.milliseconds if self.macs is None else self.macs
        if self.macs is not None:
            unit, least = "MACs", len(x) * cascade.step_macs(x.shape[1:])[0]
        else:
            times = _times(cascade, x).get(padded(len(x)))
            if times is None:
                images = f"{len(x)} images of {'x'.join(map(str, x.shape[1:]))}"
                raise ValueError(
                    f"the students have not been timed on {images}: call Budget.measure(ensemble, x) before"
                )
            unit, least = "ms", 1000 * times[0]
        if least > budget:
            raise ValueError(
                f"a budget of {budget:g} {unit} does not suffice for the first student, which takes {least:.4g} {unit} "
                f"for {len(x)} images"
            )

    def going_on(self, run: Run) -> Tensor:
        if self.macs is not None:
            fitting = [size for size in _sizes(len(run.x)) if run.macs + size * run.next_macs <= self.macs]
        else:
            assert self.milliseconds is not None
            times, left = _times(run.cascade, run.x), self.milliseconds / 1000 - run.seconds
            fitting = [size for size in _sizes(padded(len(run.x))) if times[size][run.k] <= left]
        return _least_sure(run.logits[-1], max(fitting, default=0))


def _times(cascade: Cascade, x: Tensor) -> dict[int, list[float]]:
    """Seconds that each student is taken to need for a batch of images like ``x``, by the size of the batch."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    key = "times", x.shape[1:], x.dtype, x.device, tuple(cascade.active_positions), torch.get_num_threads(), autocast
    return known(cascade).setdefault(key, {})


def _sizes(batch: int) -> list[int]:
    """The sizes that a batch can shrink to, and its own."""
    return sorted({size for size in map(padded, range(1, batch + 1)) if size <= batch} | {batch})


def _least_sure(logits: Tensor, count: int) -> Tensor:
    """Mask (n,) of the ``count`` images whose largest probability is smallest."""
    order = confidence(logits).argsort(stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def _slowest_steps(cascade: Cascade, x: Tensor) -> list[float]:
    """Twice the slowest of 20 runs of each student, or of as many as fit into a second, but at least 5.

    In seconds. The first run counts: for a batch size that has not come for a while, kernels are made anew.
    """
    runs: list[list[float]] = []
    while len(runs) < 5 or (len(runs) < 20 and sum(map(sum, runs)) < 1):
        watch = _Watch()
        began = time.perf_counter()
        run_cascade(cascade, x, watch)
        moments = [0.0, *watch.moments, time.perf_counter() - began]
        runs.append([after - before for before, after in pairwise(moments)])
    return [2 * max(times) for times in zip(*runs, strict=True)]


class _Watch:
    """Keeps all images, and notes when each student but the last has finished and been judged."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def going_on(self, run: Run) -> Tensor:
        _least_sure(run.logits[-1], run.logits.shape[1])
        self.moments.append(run.seconds)
        return torch.ones(run.logits.shape[1], dtype=torch.bool, device=run.logits.device)


def _numbers(what: str, values: Any, allowed: Any, words: str) -> list[float]:
    """``values`` as numbers, all of which ``allowed`` allows; else a ValueError."""
    if getattr(values, "ndim", None) == 1:  # a tensor or an array, of what need not be a Real
        values = values.tolist()
    if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, Sequence):
        raise ValueError(f"{what} must be a list of numbers, got {values!r}")
    for value in values:
        if not _is_finite(value) or not allowed(float(value)):
            raise ValueError(f"{what} must be {words}, got {value!r}")
    return [float(value) for value in values]


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and not math.isinf(float(value))
    except OverflowError:
        return False
