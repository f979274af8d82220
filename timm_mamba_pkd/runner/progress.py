"""A progress bar on a terminal, silence otherwise (log lines are the caller's)."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], title: str) -> "tqdm[T]":
    """``items`` with a bar titled ``title`` on a terminal; plain elsewhere."""
    return tqdm(items, desc=title, leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True)
