"""The folder a run writes: one place for its config, log, metrics, checkpoints, weights and report."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from timm_mamba_pkd.files import WriteError, leftover_files, write_file
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.source import Source

REPORT = ("results.csv", "results.md", "accuracy_macs.png", "curves.png")


class RunFolder:
    """``<output>/``: its config, record, log and metrics, checkpoints/, weights/, and the report."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def expanded(self) -> Path:
        return self.path / "expanded.yaml"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def calibration(self) -> Path:
        return self.path / "calibration"

    def weights(self, name: str) -> Path:
        return self.path / "weights" / f"{name}.safetensors"

    @property
    def begun(self) -> bool:
        """Whether a run, or anything that a run would write, is here."""
        return any(path.exists() for path in self._written())

    @property
    def finished(self) -> bool:
        """Whether the run here has been tested and reported."""
        return (self.path / "results.csv").exists()

    @property
    def abandoned(self) -> bool:
        """Whether a run was killed here before its config, the last file of `create`, was there."""
        others = [path for path in self._written() if path not in (self.record, self.expanded)]
        if any(path.exists() for path in others) or not self.record.exists():
            return False
        try:
            return self._read_record()["starts"] == []
        except ConfigError:  # a file of the user's
            return False

    @property
    def destination_digests(self) -> list[str]:
        """SHA-256 of what the run here has written, or was about to write, to the ``dst_ckpt`` of its config."""
        try:
            return self._read_record().get("dst_ckpt", [])
        except ConfigError:
            return []

    def _written(self) -> Sequence[Path]:
        weights = self.weights("").parent
        reports = [self.path / name for name in REPORT]
        found = (self.config, self.expanded, self.record, self.log, self.metrics, self.checkpoints, self.calibration)
        return [*found, weights, *reports]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The right to write here, for one process; the system takes it back when that process ends, however it does.

        Raises:
            ConfigError: the folder cannot be made, or another run is writing in it.
        """
        make_folder(self.path)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"another run is writing in {self.path}: wait, or choose another --output") from error
        try:
            yield
        finally:
            lock.release()

    def create(
        self, config: str, expanded: str | None, flags: Mapping[str, Any], inputs: Mapping[str, int | str]
    ) -> None:
        """Start a run here: the text of its config, what a schedule in it stands for, flags, and `describe_inputs`."""
        self._write_record({"flags": dict(flags), "inputs": dict(inputs), "starts": []})
        if expanded is not None:
            write_file(self.expanded, expanded.encode())
        write_file(self.config, config.encode())

    def note_start(self, start: Mapping[str, Any]) -> None:
        """Add a start of the run to its record."""
        record = self._read_record()
        self._write_record({**record, "starts": [*record["starts"], start]})

    def starts(self) -> list[dict[str, Any]]:
        """The starts of the run, as `note_start` took them down."""
        return self._read_record()["starts"]

    @property
    def flags(self) -> dict[str, Any]:
        """The flags that the run was begun with; None and False are those of one that was not there."""
        return self._read_record()["flags"]

    def note_destination(self, digest: str) -> None:
        """Add what is about to be written to ``dst_ckpt`` to the record."""
        written = self.destination_digests
        if digest not in written:
            self._write_record({**self._read_record(), "dst_ckpt": [*written, digest]})

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads(self.record.read_text())
            maps, lists = (record["flags"], record.get("inputs", {})), (record["starts"], record.get("dst_ckpt", []))
            if all(isinstance(part, dict) for part in maps) and all(isinstance(part, list) for part in lists):
                return record
        except (ValueError, TypeError, KeyError, OSError):
            pass
        raise _damaged(self.record)

    def _write_record(self, record: Mapping[str, Any]) -> None:
        write_file(self.record, f"{json.dumps(record, indent=2)}\n".encode())

    def require_same(self, config_path: str | Path, flags: Mapping[str, Any], advice: str) -> None:
        """Raise a ConfigError, which ends in ``advice``, unless the run here was started with this config and these
        flags.
        """
        now = Source.read(config_path).text.splitlines()
        try:
            then = Source.read(self.config).text.splitlines()
        except ConfigError as error:
            raise _damaged(self.config) from error
        if then != now:
            pairs = zip([*then, None], [*now, None], strict=False)
            line = next(number for number, (one, other) in enumerate(pairs, start=1) if one != other)
            raise ConfigError(f"{config_path} differs in line {line} from {self.config}, as the run began: {advice}")
        begun = self._read_record()["flags"]
        for flag, value in flags.items():
            then, now = _typed(flag, begun.get(flag)), _typed(flag, value)
            if then != now:
                raise ConfigError(f"the run in {self.path} began {then}, not {now}: {advice}")

    def require_same_inputs(self, inputs: Mapping[str, int | str]) -> None:
        """Raise a ConfigError unless the run here was started with these `describe_inputs`."""
        begun = self._read_record().get("inputs", {})
        for name, now in inputs.items():
            then = begun.get(name, now)
            if then != now:
                what = f"{then} {name}, not with {now}" if isinstance(now, int) else f"other {name}"
                raise ConfigError(
                    f"the run in {self.path} began with {what}: put back what it began with, choose another --output, "
                    "or start anew with --fresh"
                )

    def require_folders(self) -> None:
        """Raise a ConfigError if there is something else in the place of a folder of the run."""
        for folder in (self.checkpoints, self.weights("").parent):
            if folder.exists() and not folder.is_dir():
                raise _damaged(folder)

    def move_away(self, *others: Path) -> Path | None:
        """Move all that a run has written here, and ``others``, into a new folder old-1, old-2, ...; returns it."""
        return move_to_old(self.path, *self._written(), *others)

    def remove_leftovers(self) -> None:
        """Remove the temporary files of writers that were killed."""
        for folder in (self.path, self.weights("").parent):
            for leftover in leftover_files(folder):
                leftover.unlink()

    def rewrite_metrics(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Make metrics.jsonl these lines of JSON."""
        write_file(self.metrics, "".join(f"{json.dumps(record)}\n" for record in records).encode())

    def log_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line of JSON to metrics.jsonl."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise WriteError(error.errno, error.strerror, str(self.metrics)) from error


def _damaged(path: Path) -> ConfigError:
    return ConfigError(f"{path} is damaged: put it back, choose another --output, or start anew with --fresh")


def _typed(flag: str, value: Any) -> str:
    """A flag as it is on the command line; False and None are those of one that is not there."""
    if value is None or value is False:
        return f"without {flag}"
    return f"with {flag}" if value is True else f"with {flag} {value}"


def move_to_old(folder: Path, *paths: Path) -> Path | None:
    """Move those of ``paths`` that are there into a new folder old-1, old-2, ... in ``folder``; returns it."""
    there = [path for path in paths if path.exists()]
    if not there:
        return None
    number = 1
    while (folder / f"old-{number}").exists():
        number += 1
    old = folder / f"old-{number}"
    old.mkdir(parents=True)
    for path in there:
        shutil.move(path, old / path.name)
    return old


def make_folder(path: Path) -> None:
    """Make a folder that results will be written to, or raise a ConfigError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission")
    except OSError as error:
        raise ConfigError(f"folder {path} cannot be written: {error.strerror or error}") from error


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """A folder to write to; it, and those above it, are not left behind empty."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    try:
        yield
    finally:
        for folder in new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
