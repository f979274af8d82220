"""The end of a run: every model it has, measured on the test set and written up."""

import logging
from typing import Any

import torch
from torch import nn

from timm_mamba_pkd.models import MambaPKDEnsemble
from timm_mamba_pkd.report import Row, count_macs, count_params, measure_latency, read_metrics, write_report
from timm_mamba_pkd.runner.config import Job
from timm_mamba_pkd.runner.evaluate import evaluate, evaluate_ensemble
from timm_mamba_pkd.runner.run_folder import RunFolder

logger = logging.getLogger(__name__)


def measure(job: Job, device: torch.device, amp: torch.dtype | None = None, student_only: bool = False) -> list[Row]:
    """Accuracy on the test set and cost of the teacher, of each student alone, and of the ensemble after each student.

    The rows come in that order. A run without a teacher or without an ensemble has the rows that it has.
    """
    loader = job.test_loader
    teacher_macs = None if job.teacher is None else count_macs(job.teacher, job.input_size)

    def row(model: nn.Module, name: str, role: str, k: int | None, top1: float) -> Row:
        macs = count_macs(model, job.input_size)
        return Row(
            model=name,
            role=role,
            k=k,
            top1=top1,
            param_count=count_params(model) / 1e6,
            gmacs=macs / 1e9,
            macs_pct=None if teacher_macs is None else 100 * macs / teacher_macs,
            ms_per_image=measure_latency(model, job.input_size, device),
        )

    rows = []
    if job.teacher is not None and not student_only:
        accuracies = evaluate(job.teacher, loader, device, job.topk, amp, "test teacher")
        _log_accuracies("teacher", job.topk, accuracies)
        teacher_config = job.config["models"]["teacher_model"]
        rows.append(row(job.teacher, _name(teacher_config), "teacher", None, accuracies[0]))
    if not isinstance(job.student, MambaPKDEnsemble):
        accuracies = evaluate(job.student, loader, device, job.topk, amp, "test student")
        _log_accuracies("student", job.topk, accuracies)
        return [*rows, row(job.student, _name(job.student_config), "student", 1, accuracies[0])]

    ensemble = job.student
    alone, together = evaluate_ensemble(ensemble, loader, device, amp, "test students")
    positions = ensemble.active_positions
    for i, top1 in zip(positions, alone, strict=True):
        rows.append(row(ensemble.alone(i), ensemble.names[i], "student", i + 1, top1))
    if len(positions) == positions[-1] + 1:
        for k, top1 in enumerate(together, start=1):
            rows.append(row(ensemble.first(k), f"ensemble_{k}", "ensemble", k, top1))
    return rows


def report(rows: list[Row], run: RunFolder, device_name: str, seed: int) -> None:
    """Write the tables and plots of ``rows`` and of the run's metrics into the run's folder."""
    metrics = read_metrics(run.metrics) if run.metrics.exists() else []
    write_report(rows, metrics, run.path, device_name=device_name, seed=seed)


def _name(model_config: dict[str, Any]) -> str:
    return (model_config.get("kwargs") or {}).get("model_name", model_config["key"])


def _log_accuracies(who: str, topk: tuple[int, ...], accuracies: list[float]) -> None:
    logger.info("%s: %s", who, "  ".join(f"Acc@{k} {value:.2f}" for k, value in zip(topk, accuracies, strict=True)))
