"""torchdistill's box for a job."""

import torch
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.core.training import TrainingBox, get_training_box

from timm_mamba_pkd.runner.config import Job

Box = DistillationBox | TrainingBox


def build_box(job: Job, device: torch.device) -> Box:
    """The box that trains ``job``, in its first stage. `check` says beforehand what would fail."""
    arguments = (job.datasets, job.config["train"], device, None, False, 1)
    if job.teacher is None:
        return get_training_box(job.student, *arguments)
    return get_distillation_box(job.teacher, job.student, *arguments)
