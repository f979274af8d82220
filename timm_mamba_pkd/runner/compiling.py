"""``--torchcompile``: teacher and students compiled in place, so that their names and weights stay as they are."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from timm_mamba_pkd.distillation import StageWrapper
from timm_mamba_pkd.models import MambaPKDEnsemble
from timm_mamba_pkd.runner.config import Job, stages
from timm_mamba_pkd.runner.errors import ConfigError, first_line

logger = logging.getLogger(__name__)


def require_backend(name: str) -> None:
    """Raise a ConfigError unless ``torch.compile`` has a backend of this name."""
    backends = torch.compiler.list_backends(exclude_tags=())
    if name not in backends:
        known = [known for known in backends if not known.endswith("_TESTING_ONLY") and "minifier" not in known]
        raise ConfigError(f"--torchcompile {name}: torch.compile has no such backend; it has {', '.join(known)}")


def compile_models(job: Job, box: Any, backend: str) -> None:
    """Have teacher and students compiled when they are first called; the log says what is not."""
    student = job.student
    models: list[nn.Module] = list(student.students) if isinstance(student, MambaPKDEnsemble) else [student]
    models += [] if job.teacher is None else [job.teacher]
    for model in models:
        model.compile(backend=backend)
    # Students share their code, and with it this limit of compilations: training, evaluation, last batches ...
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(models))
    rebuilt = {
        role
        for stage in stages(job.config["train"])
        for role in ("teacher", "student", "model")
        if (stage.get(role) or {}).get("sequential")
    }
    left = [f"the {role}'s sequential parts" for role in sorted(rebuilt)]
    wrapper = getattr(box, "student_model", None)
    if isinstance(wrapper, StageWrapper) and wrapper.rule.judges:
        left.append("students that reuse features of others")
    logger.info("Compiling with %s%s", backend, f"; not compiled: {', '.join(left)}" if left else "")


@contextmanager
def explaining(backend: str | None) -> Iterator[None]:
    """A compiler that fails in this context is a ConfigError."""
    try:
        yield
    except TorchDynamoException as error:
        reason = first_line(getattr(error, "inner_exception", error))
        raise ConfigError(
            f"--torchcompile {backend} fails ({reason}): leave it out, or name another backend"
        ) from error
