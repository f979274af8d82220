"""``mamba-pkd calibrate``: fits an ensemble's early exit on the validation split, and tests what it saves."""

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.datasets.util import build_data_loader

from timm_mamba_pkd import distributed
from timm_mamba_pkd.files import write_file
from timm_mamba_pkd.models import (
    Confidence,
    MambaPKDEnsemble,
    confidence,
    count_macs,
    save_weights,
)
from timm_mamba_pkd.models.calibration import Point, exits, fit_temperatures, trade_off
from timm_mamba_pkd.report import calibration_to_markdown, calibration_to_text, plot_calibration
from timm_mamba_pkd.report.calibration import auroc_of_failure, expected_calibration_error, reliability
from timm_mamba_pkd.report.table import significant
from timm_mamba_pkd.runner.config import Job, stages
from timm_mamba_pkd.runner.device import autocast
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.evaluate import evaluate
from timm_mamba_pkd.runner.interrupts import deferring
from timm_mamba_pkd.runner.progress import progress
from timm_mamba_pkd.runner.record import describe_start
from timm_mamba_pkd.runner.run_folder import RunFolder, make_folder, move_to_old
from timm_mamba_pkd.runner.set_up import device_of, run_folder, set_up
from timm_mamba_pkd.runner.trained import load_trained
from timm_mamba_pkd.runner.validation import validation_split

logger = logging.getLogger(__name__)

FILES = ("calibration.json", "calibration.md", "calibration.png")
MARGIN = 10  # images leave only with a tenth of the doubt at which one on the validation split still changed its class
BATCHES = {256: 1024, 1: 128}  # sizes of the timed batches, or all test images, and on how many at most
TURNS = 5  # of timing
CURVE = 10  # cascades that are tested beside the chosen one


@dataclass
class Outcome:
    """What an ensemble says of a data set of n images.

    Attributes:
        alone: logits (N, n, C) of each student.
        together: logits (N, n, C) of the ensemble after each.
        targets: labels (n,).
    """

    alone: Tensor
    together: Tensor
    targets: Tensor

    def right(self) -> Tensor:
        """Which predictions of the ensemble after each student are right, bool (N, n)."""
        return self.together.argmax(-1) == self.targets


def run_calibrate(args: argparse.Namespace) -> None:
    """``mamba-pkd calibrate``: fit, test, then save the policy with the run's ensemble, and the report of it."""
    if distributed.launched():
        raise ConfigError("calibrate works in one process: start it without torchrun")
    if args.max_macs is not None and not 0 < args.max_macs < float("inf"):
        raise ConfigError(f"--max-macs {args.max_macs:g} is not a number above 0")
    if args.min_accuracy is not None and not 0 <= args.min_accuracy <= 100:
        raise ConfigError(f"--min-accuracy {args.min_accuracy:g} is not from 0 to 100")
    run, device = run_folder(args), device_of(args)
    if not run.finished:
        raise ConfigError(f"{run.path} holds no finished run: train it first with mamba-pkd train")
    with run.locked():
        _require_own_config(args, run)
        job, amp = set_up(args, device)
        ensemble = job.student
        if not isinstance(ensemble, MambaPKDEnsemble):
            raise ConfigError(f"{job.source.path} trains no ensemble: early exit needs several students")
        if len(ensemble.students) < 2:
            raise ConfigError(f"{job.source.path} trains a single student: early exit needs several")
        split, loader = _validation(job)
        load_trained(ensemble, run.weights("ensemble"))
        if ensemble.active_positions != list(range(len(ensemble.students))):
            names = ", ".join(str(position + 1) for position in ensemble.active_positions)
            raise ConfigError(
                f"of the {len(ensemble.students)} students in {run.weights('ensemble')}, {names} are active: "
                "early exit needs all"
            )
        ensemble.eval()
        before, ensemble.policy = ensemble.policy, None
        macs = ensemble.step_macs(job.input_size)
        if args.max_macs is not None and not 1e6 * args.max_macs >= macs[0]:
            raise ConfigError(
                f"--max-macs {args.max_macs:g} is below what the first student takes, {significant(macs[0] / 1e6)} "
                "million for every image"
            )
        logger.info("Fitting the policy on %s", split)
        held_out = _outcome(ensemble, loader, device, amp, f"calibrating on {split}")
        temperatures = fit_temperatures(held_out.together, held_out.targets)
        sure = _confidences(held_out, args.measure, temperatures)
        points = trade_off(sure, held_out.together.argmax(-1), held_out.targets, macs)
        point = _choose(args, points)
        ensemble.policy = Confidence([point.threshold] * (len(macs) - 1), temperatures, args.measure)
        logger.info("Testing: the ensemble, its early exit%s", "" if args.student_only else ", the teacher")
        tested = _outcome(ensemble, job.test_loader, device, amp, "testing")
        document = {
            "split": {"dataset_id": split, "samples": len(held_out.targets)},
            "wanted": _wanted(args),
            "measure": args.measure,
            "policy": {"thresholds": ensemble.policy.thresholds, "temperatures": temperatures},
            "students": _describe_students(job, held_out, tested),
            "reliability": _reliability(ensemble.policy, tested),
            **_compare(job, None if args.student_only else job.teacher, held_out, tested, points, device, amp),
            "made_by": describe_start(device, None, args.safe_config),
        }
        make_folder(run.calibration)
        with deferring():
            _move_report_away(run)
            if before is not None:
                logger.info("The policy takes the place of %s", before)
            save_weights(ensemble, run.weights("ensemble"))
            _write_report(document, run)
        print(calibration_to_text(document), end="")
        print(f"\nThe policy is saved in {run.weights('ensemble')}, the report in {run.calibration}")


def _require_own_config(args: argparse.Namespace, run: RunFolder) -> None:
    """Raise a ConfigError unless config and seed, which may draw the splits, are those of the run."""
    for path in (run.config, run.record):
        if not path.exists():
            raise ConfigError(f"{path}, as the run began, is missing: put it back, or train anew with --fresh")
    run.require_same(args.config, {"--seed": args.seed}, "calibrate a run with its own config and --seed")


def _move_report_away(run: RunFolder) -> None:
    """What an earlier calibration wrote, which is of another policy."""
    old = move_to_old(run.calibration, *(run.calibration / name for name in FILES))
    if old is not None:
        logger.info("Moved the report before to %s", old)


def _validation(job: Job) -> tuple[str, Iterable[Any]]:
    """The id of the config's validation split, and a loader of it."""
    config = next(stage for stage in reversed(stages(job.config["train"])) if "val_data_loader" in stage)
    config, test = config["val_data_loader"], job.config["test"]["test_data_loader"]
    advice = "train with a validation split of its own"
    split, dataset = validation_split(job.datasets, config, test["dataset_id"], job.source.path, advice)
    return split, build_data_loader(dataset, config, False)


@torch.inference_mode()
def _outcome(
    ensemble: MambaPKDEnsemble, loader: Iterable[Any], device: torch.device, amp: torch.dtype | None, title: str
) -> Outcome:
    alone, together, targets = [], [], []
    for images, labels, *_ in progress(loader, title):
        with autocast(device, amp):
            students = ensemble.student_logits(images.to(device)).float()
        alone.append(students.cpu())
        together.append(ensemble.combine(students).cpu())
        targets.append(labels)
    return Outcome(torch.cat(alone, 1), torch.cat(together, 1), torch.cat(targets))


def _confidences(outcome: Outcome, measure: str, temperatures: list[float]) -> Tensor:
    pairs = zip(outcome.together, temperatures, strict=True)
    return torch.stack([confidence(logits, measure, temperature) for logits, temperature in pairs])


def _choose(args: argparse.Namespace, points: list[Point]) -> Point:
    """The cascade that the flags ask for, of ``points`` from the cheapest to that in which nobody leaves early."""
    if args.max_macs is not None:
        cheap = [point for point in points if point.macs <= 1e6 * args.max_macs]
        if not cheap:  # where the first student's largest logits are equal
            raise ConfigError(
                f"--max-macs {args.max_macs:g} is below what the cheapest early exit takes on the validation split, "
                f"{significant(points[0].macs / 1e6)} million"
            )
        return cheap[-1]
    if args.min_accuracy is not None:
        good = [point for point in points if 100 * point.accuracy >= args.min_accuracy]
        if not good:
            best = 100 * max(point.accuracy for point in points)
            raise ConfigError(
                f"--min-accuracy {args.min_accuracy:g} is not reached on the validation split: the best is {best:.2f}"
            )
        return good[0]
    same = next(point for point in points if point.agreement == 1)
    wanted = 1 - (1 - same.threshold) / MARGIN
    return next(point for point in points if point.threshold >= wanted and point.agreement == 1)


def _wanted(args: argparse.Namespace) -> str:
    if args.max_macs is not None:
        return f"at most {args.max_macs:g} million multiply-accumulates an image on average"
    if args.min_accuracy is not None:
        return f"an accuracy of at least {args.min_accuracy:g} %"
    return "no worse than all students"


def _describe_students(job: Job, held_out: Outcome, tested: Outcome) -> list[dict[str, Any]]:
    """For the ensemble after each student: who leaves there, and how far its confidence can be trusted."""
    ensemble: Any = job.student
    policy = ensemble.policy
    rows = []
    left = [_exits(policy, outcome).bincount(minlength=len(ensemble.students)) for outcome in (held_out, tested)]
    for k, name in enumerate(ensemble.names, start=1):
        logits, right = tested.together[k - 1], tested.right()[k - 1]
        raw, tempered = (
            confidence(logits, "max_prob", temperature) for temperature in (1.0, policy.temperatures[k - 1])
        )
        rows.append(
            {
                "k": k,
                "student": name,
                "temperature": policy.temperatures[k - 1],
                "exits_val": int(left[0][k - 1]),
                "exits_test": int(left[1][k - 1]),
                "top1": 100 * float(right.double().mean()),
                "ece_untempered": expected_calibration_error(reliability(raw, right)),
                "ece": expected_calibration_error(reliability(tempered, right)),
                "auroc": auroc_of_failure(confidence(logits, policy.measure, policy.temperatures[k - 1]), right),
            }
        )
    return rows


def _exits(policy: Confidence, outcome: Outcome) -> Tensor:
    return exits(_confidences(outcome, policy.measure, list(policy.temperatures)), policy.thresholds[0])


def _reliability(policy: Confidence, tested: Outcome) -> list[list[dict[str, Any]]]:
    """The bins of the largest tempered probability of the ensemble after each student, on the test set."""
    sure = _confidences(tested, "max_prob", list(policy.temperatures))
    return [[asdict(part) for part in reliability(one, right)] for one, right in zip(sure, tested.right(), strict=True)]


def _compare(
    job: Job,
    teacher: nn.Module | None,
    held_out: Outcome,
    tested: Outcome,
    points: list[Point],
    device: torch.device,
    amp: torch.dtype | None,
) -> dict[str, Any]:
    """Accuracy, cost and time on the test set: of early exit, of the best single student that costs no more, of all
    students, of the teacher, and of other thresholds.
    """
    ensemble: Any = job.student
    policy, macs = ensemble.policy, ensemble.step_macs(job.input_size)
    totals = torch.tensor(macs, dtype=torch.float64).cumsum(0)
    rows: list[dict[str, Any]] = []
    models: list[Callable[[Tensor], Any]] = []

    def add(
        name: str, model: Callable[[Tensor], Any], students: float | None, top1: float, cost: float, **more: Any
    ) -> None:
        rows.append({"model": name, "students": students, "top1": top1, "macs": cost, **more})
        models.append(model)

    add("early exit", ensemble.predict, *_run(ensemble, job, device, amp))
    right = (held_out.alone.argmax(-1) == held_out.targets).sum(1).tolist()
    cheap = [i for i in range(len(macs)) if macs[i] <= rows[0]["macs"] and ensemble.connections()[i] is None]
    best = max(cheap, key=lambda i: right[i])  # the first student, which every image uses, is among them
    top1 = 100 * float((tested.alone[best].argmax(-1) == tested.targets).double().mean())
    add(f"{ensemble.names[best]} alone", ensemble.alone(best), 1, top1, macs[best])
    add("all students", ensemble, len(macs), 100 * float(tested.right()[-1].double().mean()), float(totals[-1]))
    if teacher is not None:
        teacher.eval()
        top1 = evaluate(teacher, job.test_loader, device, (1,), amp, "testing the teacher")[0]
        add("teacher", teacher, None, top1, count_macs(teacher, job.input_size))
    for point in _spread(points):
        other = Confidence([point.threshold] * (len(macs) - 1), policy.temperatures, policy.measure)
        at = _exits(other, tested)
        top1 = 100 * float(tested.right().gather(0, at[None]).double().mean())
        cascade = partial(ensemble.predict, policy=other)
        students = float(at.double().mean()) + 1
        add("other threshold", cascade, students, top1, float(totals[at].mean()), threshold=point.threshold)
    named, curve = ([row for row in rows if ("threshold" in row) is of_curve] for of_curve in (False, True))
    images = _first_images(job, max(BATCHES.values())).to(device)
    for size, most in BATCHES.items():
        timed = rows if size > 1 else named
        logger.info("Timing %d models at batch size %d, %d times each", len(timed), size, 2 * TURNS)
        batches = images[:most].split(size)
        for row, seconds in zip(timed, _in_turns(models[: len(timed)], batches, device, amp), strict=True):
            row[f"ms_at_batch_{len(batches[0])}"] = 1000 * seconds / min(most, len(images))
    return {"results": named, "curve": curve}


@torch.inference_mode()
def _run(
    ensemble: MambaPKDEnsemble, job: Job, device: torch.device, amp: torch.dtype | None
) -> tuple[float, float, float]:
    """Students used, top-1 in percent, and multiply-accumulates of an image alone, on average on the test set.

    By `predict` itself, in the config's batches. What pads them shows in the times.
    """
    used: list[Tensor] = []
    right = 0
    for images, targets, *_ in progress(job.test_loader, "testing early exit"):
        with autocast(device, amp):
            found = ensemble.predict(images.to(device))
        used.append(found.students.cpu())
        right += int((found.logits.argmax(-1).cpu() == targets).sum())
    students = torch.cat(used)
    totals = torch.tensor(ensemble.step_macs(job.input_size), dtype=torch.float64).cumsum(0)
    return float(students.double().mean()), 100 * right / len(students), float(totals[students - 1].mean())


def _spread(points: list[Point]) -> Iterable[Point]:
    """At most `CURVE` cascades whose costs are spread evenly on a logarithmic scale."""
    costs = torch.tensor([point.macs for point in points], dtype=torch.float64).log()
    wanted = torch.linspace(float(costs.min()), float(costs.max()), CURVE, dtype=torch.float64)
    nearest = (costs[:, None] - wanted).abs().argmin(0)
    return [points[i] for i in nearest.unique().tolist()]


def _first_images(job: Job, count: int) -> Tensor:
    found, loader = [], iter(job.test_loader)
    while sum(map(len, found)) < count and (batch := next(loader, None)) is not None:
        found.append(batch[0])
    return torch.cat(found)[:count]


@torch.inference_mode()
def _in_turns(
    models: Sequence[Callable[[Tensor], Any]], batches: Sequence[Tensor], device: torch.device, amp: torch.dtype | None
) -> list[float]:
    """Seconds that each model takes for all batches, right after it has seen them: the median of `TURNS`.

    The models take turns, so that other work on the machine hits all.
    """
    seconds = torch.zeros(TURNS, len(models), dtype=torch.float64)
    with autocast(device, amp):
        for turn in progress(range(TURNS), f"timing batches of {len(batches[0])}"):
            for i, model in enumerate(models):
                for _ in range(2):  # the second one counts
                    began = time.perf_counter()
                    for batch in batches:
                        model(batch)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    seconds[turn, i] = time.perf_counter() - began
    return seconds.median(0).values.tolist()


def _write_report(document: dict[str, Any], run: RunFolder) -> None:
    data, text, plot = (run.calibration / name for name in FILES)
    write_file(data, f"{json.dumps(document, indent=2)}\n".encode())
    write_file(text, calibration_to_markdown(document).encode())
    plot_calibration(document, plot)
