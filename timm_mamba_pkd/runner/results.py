"""The end of a run: every model it has, measured on the test set and written up."""

import logging

import torch
from torch import nn

from timm_mamba_pkd.distributed import is_main
from timm_mamba_pkd.models import MambaPKDEnsemble, count_macs
from timm_mamba_pkd.report import Row, count_params, measure_latency, read_metrics, write_report
from timm_mamba_pkd.runner.config import Job, model_name
from timm_mamba_pkd.runner.evaluate import evaluate, evaluate_ensemble
from timm_mamba_pkd.runner.run_folder import RunFolder

logger = logging.getLogger(__name__)


def measure(job: Job, device: torch.device, amp: torch.dtype | None = None, student_only: bool = False) -> list[Row]:
    """Accuracy on the test set and cost of the teacher, of each student alone, and of the ensemble after each student.

    The rows come in that order. A run without a teacher or without an ensemble has the rows that it has. Several
    processes share the test set; those but rank 0 have no rows.
    """
    loader, ensemble = job.test_loader, job.student
    of_teacher: list[float] = []
    of_student: list[float] = []
    alone: list[float] = []
    together: list[float] = []
    if job.teacher is not None and not student_only:
        of_teacher = evaluate(job.teacher, loader, device, job.topk, amp, "test teacher")
        _log_accuracies("teacher", job.topk, of_teacher)
    if isinstance(ensemble, MambaPKDEnsemble):
        alone, together = evaluate_ensemble(ensemble, loader, device, amp, "test students")
    else:
        of_student = evaluate(job.student, loader, device, job.topk, amp, "test student")
        _log_accuracies("student", job.topk, of_student)
    if not is_main():
        return []
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
    if job.teacher is not None and of_teacher:
        rows.append(row(job.teacher, model_name(job.config["models"]["teacher_model"]), "teacher", None, of_teacher[0]))
    if not isinstance(ensemble, MambaPKDEnsemble):
        return [*rows, row(job.student, model_name(job.student_config), "student", 1, of_student[0])]
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


def _log_accuracies(who: str, topk: tuple[int, ...], accuracies: list[float]) -> None:
    logger.info("%s: %s", who, "  ".join(f"Acc@{k} {value:.2f}" for k, value in zip(topk, accuracies, strict=True)))
