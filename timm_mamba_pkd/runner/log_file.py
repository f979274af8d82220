"""The log of a run as a file."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchdistill.common.constant import LOGGING_FORMAT

from timm_mamba_pkd.files import WriteError
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.interrupts import Interrupted
from timm_mamba_pkd.runner.run_folder import make_folder


class _LogFile(logging.FileHandler):
    """A file that says so when it cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        try:
            raise
        except OSError as error:
            raise WriteError(error.errno, error.strerror, self.baseFilename) from error


@contextmanager
def logging_to(path: str | Path) -> Iterator[None]:
    """Append all log lines to a file, and what ended the context if it did not end well.

    Raises:
        WriteError: the disk is full, or refuses.
        ConfigError: the file cannot be made.
    """
    path = Path(path).expanduser()
    make_folder(path.parent)
    try:
        handler = _LogFile(path)
    except OSError as error:
        raise ConfigError(f"log {path} cannot be written: {error.strerror}") from error
    handler.setFormatter(logging.Formatter(LOGGING_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            handler.handle(_last_words(error))
        raise
    finally:
        root.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def _last_words(error: BaseException) -> logging.LogRecord:
    known = isinstance(error, ConfigError | FloatingPointError | Interrupted)
    message = f"Ended by {error}" if isinstance(error, Interrupted) else f"{error}"
    trace = None if known else (type(error), error, error.__traceback__)
    return logging.LogRecord("mamba-pkd", logging.ERROR, __file__, 0, message, None, trace)
