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

from timm_mamba_pkd.files import WriteError, leftover_files, write_file
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
        digest = hashlib.sha256(buffer.getbuffer()).hexdigest()[:16]
        path = self.folder / f"stage{stage}_epoch{epoch:04}_{samples:09}-{digest}.pt"
        try:
            write_file(path, buffer.getbuffer())
        except WriteError as error:
            last = self.last()
            kept = "there is no checkpoint before it" if last is None else f"the last good checkpoint is {last}"
            raise ConfigError(f"checkpoint {error}; {kept}") from error
        for old in [old for old in self._all() if old != path][KEPT - 1 :]:
            old.unlink()
        return path

    def keep_best(self, path: Path, stage: int) -> None:
        """Keep the checkpoint at ``path`` as the best of its stage."""
        match = _NAME.fullmatch(path.name)
        assert match is not None
        best = self.folder / f"best_stage{stage}-{match[4]}.pt"
        if not best.exists():
            temporary = self.folder / f".best.{os.getpid()}.tmp"
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

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint that is not damaged; None if nothing was saved.

        Raises:
            ConfigError: all are damaged.
        """
        paths = self._all()
        for path in paths:
            try:
                state = _read(path)
            except Exception as error:
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


def _read(path: Path) -> dict[str, Any]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    if _digest(path) != match[4]:
        raise ValueError("checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
