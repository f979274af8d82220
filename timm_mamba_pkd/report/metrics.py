"""The record of a training run: JSON lines, one per epoch."""

import json
import logging
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one per line, in the order of the file.

    A last line that is no object, as a killed run leaves it, is dropped with a warning in the log.

    Raises:
        ValueError: an earlier line is no JSON object. The message names the file and the line.
        OSError: the file cannot be read.
    """
    lines = Path(path).read_bytes().splitlines()
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: {error}") from error
            _logger.warning("%s, line %d: dropped, the run was killed while writing it", path, number)
        else:
            metrics.append(entry)
    return metrics
