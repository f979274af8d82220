"""``mamba-pkd select``: measures candidates on labelled samples and says which to take under constraints."""

import argparse
import copy
import importlib
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from timm_mamba_pkd.models import Confidence, MambaPKDEnsemble, Prediction, count_macs
from timm_mamba_pkd.report import (
    Candidate,
    Constraints,
    Table,
    count_params,
    describe_selection,
    measure_latency,
    measure_peak_memory,
    median_time,
    selection_to_text,
    write_selection,
)
from timm_mamba_pkd.report.selection_report import FILES
from timm_mamba_pkd.runner.device import find_device
from timm_mamba_pkd.runner.errors import ConfigError, explain, first_line
from timm_mamba_pkd.runner.named import try_image
from timm_mamba_pkd.runner.pool import Member, Samples, gather
from timm_mamba_pkd.runner.progress import progress
from timm_mamba_pkd.runner.record import describe_start
from timm_mamba_pkd.runner.run_folder import RunFolder, move_to_old, new_folder

ROUNDS, REPEATS = 5, 10  # of timing: each round times every candidate

# What --propose names: from copies of the candidates' models by name (no cascades), and what was measured of all, to
# further models by new names, which take the images of the first candidate. An empty dictionary proposes nothing.
Propose = Callable[[Mapping[str, nn.Module], Table], Mapping[str, nn.Module]]


def run_select(args: argparse.Namespace) -> int:
    """``mamba-pkd select``: what is wrong with the command is said before the first candidate is measured.

    Returns:
        the exit code: 1 if nothing keeps the constraints.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "10")  # PyTorch's profiler, which measures memory, is noisy otherwise
    limits = ("max_macs", "max_params", "max_memory", "max_latency", "min_accuracy")
    try:
        constraints = Constraints(**{name: getattr(args, name) for name in limits})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not 0 <= args.min_disagreement <= 100:
        raise ConfigError(f"--min-disagreement {args.min_disagreement:g} is not from 0 to 100 percent")
    propose = None if args.propose is None else _find_propose(args)
    device = find_device(args.device)
    default = RunFolder(args.runs[0]).path if args.runs else Path("runs")
    folder = Path(args.output).expanduser() if args.output else default / "select"
    pool = gather(args)
    with new_folder(folder):
        notes: list[str] = []
        pool, table = _without_copies(pool, _measure(pool, device, args), notes)
        if propose is not None:
            pool = [*pool, *_proposed(propose, pool, table, args)]
            pool, table = _without_copies(pool, _measure(pool, device, args), notes)
        if args.data_root is None:
            notes += [
                f"The thresholds of {member.name} were fitted on these samples: on others it may do worse."
                for member in pool
                if isinstance(member.policy, Confidence)
            ]
        about = {
            "samples_of": pool[0].samples.name,
            "notes": notes,
            "made_by": describe_start(device, None, args.safe_config),
        }
        document = describe_selection(table, constraints, {member.name: member.how for member in pool}, about)
        old = move_to_old(folder, *(folder / name for name in FILES))
        write_selection(document, folder)
    print(selection_to_text(document), end="")
    print(f"\nTable, plot and page: {folder}" + ("" if old is None else f"; what was there before: {old}"))
    return 0 if document["front"] else 1


@dataclass
class _Exits:
    """How a cascade was seen to run: for each number of students used, how many images, and one of them."""

    counts: Counter[int] = field(default_factory=Counter)
    images: dict[int, Tensor] = field(default_factory=dict)

    def add(self, images: Tensor, prediction: Prediction) -> None:
        students = prediction.students.tolist()
        self.counts.update(students)
        for k in set(students) - set(self.images):
            self.images[k] = images[students.index(k)][None].clone()

    def mean_macs(self, step_macs: Sequence[int]) -> float:
        """Of an image alone, from what each student adds."""
        return sum(count * sum(step_macs[:k]) for k, count in self.counts.items()) / self.counts.total()

    def latency(self, member: Member) -> float:
        """Mean milliseconds of an image alone: of one that uses k students, for each k, weighted by their counts."""
        total = 0.0
        for k, image in self.images.items():
            total += self.counts[k] * median_time(lambda image=image: _logits(member, image), REPEATS)
        return total / self.counts.total()


def _logits(member: Member, images: Tensor, exits: _Exits | None = None) -> Tensor:
    """Logits of a candidate; what a cascade used is added to ``exits``. On CUDA they are ready."""
    if member.policy is None:
        logits = member.model(images)
    else:
        prediction = cast(MambaPKDEnsemble, member.model).predict(images, member.policy)
        if exits is not None:
            exits.add(images, prediction)
        logits = prediction.logits
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return logits


def _measure(pool: Sequence[Member], device: torch.device, args: argparse.Namespace) -> Table:
    """Every candidate on the same samples; latencies in turns, so that a busy machine hits all."""
    exits = {member.name: _Exits() for member in pool if member.policy is not None}
    name = ""
    try:
        for member in pool:
            name = member.name
            member.model.to(device)
        predictions, targets = _predict(pool, device, exits)
        rounds: list[list[float]] = [[] for _ in pool]
        for _ in progress(range(ROUNDS), "latency"):
            for times, member in zip(rounds, pool, strict=True):
                name = member.name
                if name in exits:
                    times.append(exits[name].latency(member))
                else:
                    times.append(measure_latency(member.model, member.samples.input_size, device, REPEATS))
        candidates = []
        for member, times, predicted in zip(pool, rounds, predictions, strict=True):
            name, size = member.name, member.samples.input_size
            if isinstance(member.model, MambaPKDEnsemble) and name in exits:
                macs = exits[name].mean_macs(member.model.step_macs(size))
            else:
                macs = count_macs(member.model, size)
            candidates.append(
                Candidate(
                    member.name,
                    member.kind,
                    macs=macs / 1e6,
                    params=count_params(member.model) / 1e6,
                    memory=round(measure_peak_memory(member.model, torch.zeros(1, *size), device) / 2**10) / 2**10,
                    latency=min(times),  # of the quietest round
                    predictions=predicted,
                )
            )
    except ConfigError:
        raise
    except Exception as error:  # memory or operators that are not there, or whatever a proposed model raises
        raise _cannot_measure(name, device, error) from error
    return Table(candidates, targets, args.min_disagreement, args.seed)


def _without_copies(pool: Sequence[Member], table: Table, notes: list[str]) -> tuple[list[Member], Table]:
    """Of candidates with the same predictions, MACs and parameters the first one; ``notes`` get who is left out.

    Noise of the clock would decide between them.
    """
    kept: list[Candidate] = []
    for one in table.candidates:
        same = (
            other
            for other in kept
            if (other.macs, other.params) == (one.macs, one.params) and torch.equal(other.predictions, one.predictions)
        )
        first = next(same, None)
        if first is None:
            kept.append(one)
        else:
            notes.append(f"{one.name} is left out: its predictions, MACs and parameters are those of {first.name}.")
    names = {candidate.name for candidate in kept}
    return [member for member in pool if member.name in names], Table(
        kept, table.targets, table.min_disagreement, table.seed
    )


def _cannot_measure(name: str, device: torch.device, error: Exception) -> ConfigError:
    return ConfigError(f"{name} cannot be measured on {device}: {first_line(error)}")


@torch.inference_mode()
def _predict(pool: Sequence[Member], device: torch.device, exits: Mapping[str, _Exits]) -> tuple[list[Tensor], Tensor]:
    """The classes that each candidate predicts, and the labels, int64 (N,).

    Raises:
        ConfigError: a label is none of a model's classes, or the candidates' samples are not the same ones.
    """
    predicted: dict[str, Tensor] = {}
    first: tuple[Samples, Tensor] | None = None
    for samples in dict.fromkeys(member.samples for member in pool):
        group = [member for member in pool if member.samples is samples]
        found: list[list[Tensor]] = [[] for _ in group]
        targets = []
        for images, labels in progress(samples, "samples"):
            images = images.to(device)
            for member, batches in zip(group, found, strict=True):
                try:
                    logits = _logits(member, images, exits.get(member.name))
                except Exception as error:
                    raise _cannot_measure(member.name, device, error) from error
                _require_classes(labels, logits, member)
                batches.append(logits.argmax(-1).cpu())
            targets.append(labels.to(torch.int64))
        targets = torch.cat(targets)
        if first is None:
            first = samples, targets
        elif not torch.equal(targets, first[1]):
            raise ConfigError(
                f"{samples.name} and {first[0].name} are not the same samples, so their accuracies cannot be compared: "
                "name runs with one validation split, or labelled images by --data-root"
            )
        predicted |= {member.name: torch.cat(batches) for member, batches in zip(group, found, strict=True)}
    assert first is not None
    return [predicted[member.name] for member in pool], first[1]


def _require_classes(labels: Tensor, logits: Any, member: Member) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"{member.name} must return logits ({len(labels)}, classes) for {len(labels)} images, got {got}"
        )
    outputs = logits.shape[-1]
    if labels.ndim != 1 or labels.is_floating_point() or int(labels.min()) < 0:
        raise ConfigError(f"the samples of {member.samples.name} have no labels: they must be classes from 0")
    if int(labels.max()) >= outputs:
        raise ConfigError(
            f"{member.samples.name} has a label {int(labels.max())}, {member.name} has {outputs} classes: they must be "
            "the classes that it was trained on"
        )


def _find_propose(args: argparse.Namespace) -> Propose:
    """The function that ``--propose`` names."""
    if args.safe_config:
        raise ConfigError("--propose runs code, which --safe-config refuses: leave one of them out")
    module, _, name = args.propose.partition(":")
    if not module or not name:
        raise ConfigError(f"--propose {args.propose} must be MODULE:FUNCTION")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module raises when it is imported
        raise ConfigError(
            f"--propose {args.propose} must be MODULE:FUNCTION of a module that can be imported: {explain(error)}"
        ) from error
    if not callable(function):
        raise ConfigError(f"--propose {args.propose} is no function")
    propose: Any = function
    return propose


def _proposed(propose: Propose, pool: Sequence[Member], table: Table, args: argparse.Namespace) -> list[Member]:
    """The candidates that a function proposes; they take the images of the first candidate, and are run as this is."""
    try:
        copies = {member.name: copy.deepcopy(member.model) for member in pool if member.policy is None}
        models: Any = propose(copies, table)
    except Exception as error:  # whatever the function raises
        raise ConfigError(f"--propose {args.propose} raised {type(error).__name__}: {first_line(error)}") from error
    known = {member.name for member in pool}
    if not isinstance(models, Mapping) or not all(
        isinstance(name, str) and isinstance(model, nn.Module) and name not in known for name, model in models.items()
    ):
        raise ConfigError(f"--propose {args.propose} must return a dictionary of new names and torch modules")
    samples = pool[0].samples
    for name, model in models.items():
        try_image(model.eval().cpu(), name, samples.input_size)
    how = shlex.join(sys.orig_argv)
    return [Member(name, "proposed", model, samples, how) for name, model in models.items()]
