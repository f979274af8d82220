"""torchdistill's boxes for a job, but that a stage's ``src_ckpt`` is read as tensors only."""

from typing import Any

import torch
from torchdistill.core.distillation import DistillationBox, MultiStagesDistillationBox
from torchdistill.core.training import MultiStagesTrainingBox, TrainingBox

from timm_mamba_pkd.distillation import weights_file
from timm_mamba_pkd.models import load_weights
from timm_mamba_pkd.runner.config import Job

Box = DistillationBox | TrainingBox


def build_box(job: Job, device: torch.device) -> Box:
    """The box that trains ``job``, in its first stage. `check` says beforehand what would fail.

    Raises:
        WeightsError: a stage's ``src_ckpt`` is missing, damaged, not plain, or of another model.
    """
    arguments = (job.datasets, job.config["train"], device, None, False, 1)
    staged = "stage1" in job.config["train"]
    if job.teacher is None:
        return (_StagedTraining if staged else _Training)(job.student, *arguments)
    return (_StagedDistillation if staged else _Distillation)(job.teacher, job.student, *arguments)


class _Training(TrainingBox):
    def setup_model(self, model_config: dict[str, Any]) -> None:
        super().setup_model(_without_weights(model_config))
        _load(self.model, model_config)


class _Distillation(DistillationBox):
    def setup_teacher_student_models(self, teacher_config: dict[str, Any], student_config: dict[str, Any]) -> None:
        super().setup_teacher_student_models(_without_weights(teacher_config), _without_weights(student_config))
        _load(self.teacher_model, teacher_config)
        _load(self.student_model, student_config)


class _StagedTraining(_Training, MultiStagesTrainingBox):
    """One stage after another."""


class _StagedDistillation(_Distillation, MultiStagesDistillationBox):
    """One stage after another."""


def _without_weights(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "src_ckpt": None} if config.get("src_ckpt") else config


def _load(model: Any, config: dict[str, Any]) -> None:
    if config.get("src_ckpt"):
        load_weights(model, weights_file(config["src_ckpt"]))
