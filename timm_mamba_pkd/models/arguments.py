"""The arguments of models, checked when a model is made."""

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from timm.models import is_model, is_model_in_modules, list_models

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
POOLINGS = ("avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")  # timm's


def check_img_size(img_size: int | Iterable[int]) -> tuple[int, int]:
    """(height, width) of an image size.

    Raises:
        ValueError: it is no whole number or pair, or too small.
    """
    size: Any = tuple(img_size) if isinstance(img_size, Iterable) else (img_size, img_size)
    if len(size) != 2 or not all(is_whole(side) for side in size):
        raise ValueError(f"img_size must be a whole number or (height, width), got {img_size!r}")
    if min(size) < 8:
        raise ValueError(f"img_size must be at least 8 (the network halves the grid three times), got {img_size}")
    return size


def check_images(x: Any, in_chans: int) -> None:
    """Raise a ValueError unless ``x`` is a batch of at least one image with ``in_chans`` channels, not too small."""
    shape = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] != in_chans or not len(x):
        raise ValueError(f"images must be a tensor (B, {in_chans}, H, W) of at least one image, got {shape}")
    if min(x.shape[2:]) < 8:
        raise ValueError(f"images must be at least 8 pixels high and wide, got {shape}")


def check_like(x: torch.Tensor, weights: torch.Tensor) -> None:
    """Raise a ValueError unless images ``x`` have the device of ``weights``, not meta, and a dtype that goes with them.

    That is theirs, or under autocast one that it casts.
    """
    if weights.is_meta:
        raise ValueError("the model is on the meta device: load weights before")
    dtypes, kind = [weights.dtype], weights.device.type
    if torch.is_autocast_enabled(kind) and weights.dtype != torch.float64:
        dtypes = [torch.float32, torch.get_autocast_dtype(kind)]
    if x.dtype not in dtypes or x.device != weights.device:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"images must be {wanted} on {weights.device}, got {x.dtype} on {x.device}")


def check_count(name: str, count: Any, least: int, most: int | None = None) -> None:
    """Raise a ValueError unless ``count`` is a whole number from ``least`` up, or to ``most``."""
    if not is_whole(count) or count < least or (most is not None and count > most):
        zero = " (no classifier)" if least == 0 else ""
        end = "up" if most is None else f"to {most}"
        raise ValueError(f"{name} must be a whole number from {least}{zero} {end}, got {count!r}")


def is_whole(number: Any) -> bool:
    """Whether it is an integer, and no truth value."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def check_rates(**rates: Any) -> None:
    """Raise a ValueError unless all are probabilities below 1."""
    for name, rate in rates.items():
        if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 <= float(rate) < 1:
            raise ValueError(f"{name} must be a number from 0 to below 1, got {rate!r}")


def check_dtype(dtype: Any) -> None:
    """Raise a ValueError unless the parameters can be of ``dtype``; None is torch's default."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be {', '.join(map(str, DTYPES))}, got {dtype!r}")


def check_pool(pool_type: Any, num_classes: int) -> None:
    """Raise a ValueError unless it is one of timm's poolings, or, where there is no classifier, none ('')."""
    if pool_type not in POOLINGS and (pool_type != "" or num_classes):
        known = f"one of {', '.join(POOLINGS)}, and '' where num_classes is 0"
        raise ValueError(f"global_pool must be {known}, got {pool_type!r}")


def check_names(students: Any) -> None:
    """Raise a ValueError unless ``students`` are names of models that an ensemble can be of."""
    names = [] if isinstance(students, str) or not isinstance(students, Sequence) else students
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"students must be a list of at least one model name, got {students!r}")
    for name in names:
        if not is_model(name):
            ours = ", ".join(list_models(module="mamba_pkd"))
            raise ValueError(f"unknown student '{name}'; ours are {ours}, or any timm model")
        if is_model_in_modules(name, ["ensemble"]):
            raise ValueError(f"{name} cannot be a student itself: name its students")
