"""Files that are whole or absent."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LEFTOVER = ".mamba-pkd.tmp"


class WriteError(OSError):
    """A file of ours that cannot be written: the disk is full, or refuses."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"


@contextmanager
def whole_file(path: str | Path, replace: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which appears at `path` only when it is complete and on disk, with what was there replaced.

    Its folder must exist. A process that is killed leaves the old file, and a temporary one named as
    `leftover_files` expects. Without `replace` a file that is there is an error, of number EEXIST.

    Raises:
        WriteError: the disk is full, or refuses.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (os.replace if replace else rename_to_new)(temporary, path)
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_file(path: str | Path, content: bytes | memoryview, replace: bool = True) -> None:
    """Write `content` to `path` as `whole_file` does."""
    with whole_file(path, replace) as file:
        file.write(content)


def rename_to_new(temporary: Path, path: Path) -> None:
    """Give a file the name `path`, which nothing may have; the old name may stay, for the caller to remove.

    Raises:
        FileExistsError: there is something at `path`, which stays as it is.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(temporary, path)


def temporary_path(path: Path) -> Path:
    """Where this process keeps what is to become the file at `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}{LEFTOVER}")


def leftover_files(folder: str | Path) -> Iterator[Path]:
    """The temporary files in a folder that writers left when they were killed, or are writing now."""
    return Path(folder).glob(f".*{LEFTOVER}")


def sync_folder(folder: Path) -> None:
    """Have the names of a folder's files on disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse it
        pass
    finally:
        os.close(descriptor)
