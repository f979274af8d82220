"""A progress bar on a terminal, silence otherwise (log lines are the caller's)."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from timm_mamba_pkd.distributed import is_main

T = TypeVar("T")


def progress(items: Iterable[T], title: str, total: int | None = None, done: int = 0) -> "tqdm[T]":
    """``items`` with a bar titled ``title`` on a terminal; plain elsewhere. ``done`` of ``total`` have gone before."""
    hidden = not (sys.stderr.isatty() and is_main())
    return tqdm(items, desc=title, total=total, initial=done, leave=False, disable=hidden, dynamic_ncols=True)
