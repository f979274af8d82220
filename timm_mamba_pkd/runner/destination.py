"""``dst_ckpt`` of a config: the trained model at a place of the user's, where a run replaces its own file only."""

import errno
import hashlib
import os
from pathlib import Path

from torch import nn

from timm_mamba_pkd.files import WriteError, write_file
from timm_mamba_pkd.models.weights import checkpoint_file_of, weights_file_of
from timm_mamba_pkd.runner.config import Job, local_file, stage_weights
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.run_folder import RunFolder


def is_own(path: Path, run: RunFolder) -> bool:
    """Whether the file at ``path`` is there and is what the run in the folder has written to its ``dst_ckpt``."""
    written = run.destination_digests
    try:
        return bool(written) and _digest(path.read_bytes()) in written
    except OSError:
        return False


def require_separate(job: Job) -> None:
    """Raise a ConfigError if ``dst_ckpt`` is a file that the run reads, and would read again when it goes on."""
    if job.destination is None:
        return
    models = job.config["models"]
    files = [(("models", role, "src_ckpt"), local_file((models[role] or {}).get("src_ckpt"))) for role in models]
    for keys, path in [*files, *stage_weights(job.config["train"])]:
        if path is not None and os.path.realpath(path) == os.path.realpath(job.destination):
            raise ConfigError(
                f"dst_ckpt {job.destination} is also {'.'.join(keys)}, which it would overwrite: name another file",
                at=("models", job.student_role, "dst_ckpt"),
            )


def require_free(path: Path, run: RunFolder, fresh: bool) -> None:
    """Raise a ConfigError if there is anything at ``path`` that a run which begins would not move away as its own, or
    if it is to write its other weights there.
    """
    if path.parent.resolve() == run.weights("").parent.resolve():
        raise ConfigError(f"dst_ckpt {path} is among the weights that the run writes anyway: name another file")
    if path.exists() and not (fresh and is_own(path, run)):
        raise ConfigError(f"dst_ckpt {path} exists already: move it away, or test it with mamba-pkd evaluate")


def require_own(path: Path, run: RunFolder) -> None:
    """Raise a ConfigError if there is anything at ``path`` that the run to resume has not written."""
    if path.exists() and not is_own(path, run):
        raise ConfigError(f"dst_ckpt {path} is there and not of the run in {run.path}: move it away")


def save_destination(model: nn.Module, path: Path, run: RunFolder) -> None:
    """Write ``model`` to ``path``, in torchdistill's format unless it is named .safetensors.

    Raises:
        ConfigError: there is a file that the run has not written.
        WriteError: the disk is full, or refuses.
    """
    own = is_own(path, run)
    content = (weights_file_of if path.suffix == ".safetensors" else checkpoint_file_of)(model)
    run.note_destination(_digest(content))  # before it is there: a run that is killed knows its own file
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_file(path, content, replace=own)
    except WriteError as error:
        if error.errno != errno.EEXIST:
            raise
        raise ConfigError(
            f"dst_ckpt {path} was written by another while this run trained, and is left as it is: move it away, and "
            f"the same command saves there what is in {run.weights('').parent}"
        ) from error


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
