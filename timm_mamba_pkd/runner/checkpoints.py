"""The checkpoints of a run: whole, verified by checksum, the last two and the best of each stage."""

import hashlib
import io
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from timm_mamba_pkd.files import WriteError, leftover_files, temporary_path, write_file
from timm_mamba_pkd.runner.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

KEPT = 2
_NAME = re.compile(r"stage(\d+)_epoch(\d+)_(\d+)-([0-9a-f]{16})\.pt")


class Checkpoints:
    """``<run>/checkpoints/``: torch files of plain data, read with ``weights_only=True``.

    ``stage2_epoch0013_000000512-<sha256>.pt`` was saved in stage 2, in the 13th epoch of the run, after 512 samples of
    it; the first 16 digits of the file's SHA-256 end the name, as torch.hub has it. ``best_stage2-<sha256>.pt`` is the
    last checkpoint of the epoch of stage 2 with the best validation accuracy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: dict[str, Any], stage: int, epoch: int, samples: int) -> Path:
        """Write a checkpoint and drop all but the last two; returns its path.

        Raises:
            ConfigError: the disk is full or refuses; the earlier checkpoints are still there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in leftover_files(self.folder):
            leftover.unlink()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = self.folder / f"stage{stage}_epoch{epoch:04}_{samples:09}-{_digest(buffer.getbuffer())}.pt"
        try:
            write_file(path, buffer.getbuffer())
        except WriteError as error:
            raise ConfigError(f"checkpoint {error}; {self.last_in_words()}") from error
        for old in [old for old in self._all() if old != path][KEPT - 1 :]:
            old.unlink()
        return path

    def keep_best(self, path: Path, stage: int) -> None:
        """Keep the checkpoint at ``path`` as the best of its stage."""
        match = _NAME.fullmatch(path.name)
        assert match is not None
        best = self.folder / f"best_stage{stage}-{match[4]}.pt"
        if not best.exists():
            temporary = temporary_path(best)
            try:
                try:
                    os.link(path, temporary)
                except OSError:  # a file system without links
                    shutil.copyfile(path, temporary)
                os.replace(temporary, best)
            except OSError as error:
                raise WriteError(error.errno, error.strerror, str(best)) from error
            finally:
                temporary.unlink(missing_ok=True)
        for old in self.folder.glob(f"best_stage{stage}-*.pt"):
            if old != best:
                old.unlink()

    def last(self) -> Path | None:
        """The path of the last checkpoint."""
        return next(iter(self._all()), None)

    def last_in_words(self) -> str:
        """Where the last checkpoint is, for a message."""
        last = self.last()
        return "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint that is not damaged; None if nothing was saved.

        Raises:
            ConfigError: all are damaged, or the last one cannot be read.
        """
        paths = self._all()
        for path in paths:
            try:
                content = path.read_bytes()
            except OSError as error:  # no damage: it may be readable again
                raise ConfigError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
            try:
                state = _verified(content, path)
            except ValueError as error:
                path.rename(path.with_suffix(".damaged"))
                logger.warning("Checkpoint %s is damaged (%s) and set aside", path, first_line(error))
            else:
                logger.info("Going on from checkpoint %s", path)
                return state
        if paths:
            raise ConfigError(f"all checkpoints in {self.folder} are damaged: start anew with --fresh")
        return None

    def _all(self) -> list[Path]:
        """The paths of all checkpoints, the last one first."""
        found = [(match, path) for path in self.folder.glob("stage*.pt") if (match := _NAME.fullmatch(path.name))]
        positions = {path: tuple(map(int, match.groups()[:3])) for match, path in found}
        return sorted(positions, key=lambda path: (positions[path], path.stat().st_mtime_ns), reverse=True)


def _verified(content: bytes, path: Path) -> dict[str, Any]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    if _digest(content) != match[4]:
        raise ValueError("checksum")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a hostile pickle provokes any
        raise ValueError(f"no plain data: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise ValueError("no checkpoint")
    return state


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
