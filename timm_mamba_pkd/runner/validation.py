"""The validation split of a config, on which thresholds are fitted and models chosen: never the test set."""

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.streams import ReadableStream, first_samples
from timm_mamba_pkd.runner.unreadable import Readable


def validation_split(
    datasets: Mapping[str, Any], loader: Any, test_id: str, path: Path, advice: str
) -> tuple[str, Any]:
    """The id of the validation split, and the split: a `Readable` where it has an index.

    It is refused if it has the test set's name or first eight samples, or if both are parts of the same data (`Subset`,
    as torchdistill's ``split_dataset`` makes them), or the whole, and share a sample. Data are the same if they are one
    object, or two of one class whose attributes are equal but for transforms. What is not found: samples shared by data
    sets of different classes, by copies of the files in two places, by parts of a ``ConcatDataset``, by streams, and
    images that a data set itself holds twice.

    Args:
        datasets: of the config, by id.
        loader: the config's section of the validation loader; None if it has none.
        test_id: of the test set.
        path: of the config.
        advice: what to do instead, the end of every error.

    Raises:
        ConfigError: there is no such split, it is empty, or the test set has samples of it.
    """
    split = str(loader.get("dataset_id")) if isinstance(loader, dict) else ""
    if split not in datasets:
        raise ConfigError(f"{path} names no validation split: {advice}")
    dataset, tested = (_readable(datasets[name], name) for name in (split, test_id))
    where = f"the validation split of {path}, '{split}',"
    if isinstance(dataset, Readable) and len(dataset) == 0:
        raise ConfigError(f"{where} is empty: {advice}")
    relation = "is the test set" if split == test_id else _relation(dataset, tested, test_id)
    if relation:
        raise ConfigError(f"{where} {relation}, on which nothing may be fitted or chosen: {advice}")
    return split, dataset


def _readable(dataset: Any, name: str) -> Any:
    """The data set, made to say which of its samples cannot be read, where it has an index."""
    if isinstance(dataset, (Readable, IterableDataset)) or not isinstance(dataset, Sized):
        return dataset
    return Readable(dataset, name, training=False)


def _relation(dataset: Any, tested: Any, test_id: str) -> str:
    """That a split has samples of the test set, in words; empty if that is not found."""
    if not all(isinstance(found, (Readable, ReadableStream)) for found in (dataset, tested)):
        return ""
    if isinstance(dataset, Readable) and isinstance(tested, Readable):
        (data, indices), (test_data, test_indices) = _part(dataset), _part(tested)
        count = len(indices & test_indices)
        if count and _same(data, test_data):
            return f"shares {count} of its {len(indices)} samples with the test set, '{test_id}'"
    pairs = zip(first_samples(dataset, 8), first_samples(tested, 8), strict=False)
    alike = all(_same(mine, theirs) for one, two in pairs for mine, theirs in zip(one[:2], two[:2], strict=True))
    return f"begins with the same samples as the test set, '{test_id}'" if alike else ""


def _part(dataset: Any) -> tuple[Any, set[int]]:
    """The data that a data set is a part of, and which of its samples it has."""
    indices: Any = range(len(dataset))
    while isinstance(dataset, (Readable, Subset)):
        if isinstance(dataset, Subset):
            own = list(dataset.indices)
            indices = [int(own[i]) for i in indices]
        dataset = dataset.dataset
    return dataset, set(indices)


def _same(one: Any, other: Any) -> bool:
    """Whether two objects are equal in value; those that cannot be compared are so by their attributes."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    try:  # functions and classes have attributes, too
        if callable(one) or type(one).__eq__ is not object.__eq__:
            return bool(one == other)
        mine, theirs = (
            {name: value for name, value in vars(found).items() if "transform" not in name} for found in (one, other)
        )
        return mine.keys() == theirs.keys() and all(_same(mine[name], theirs[name]) for name in mine)
    except Exception:  # no attributes, attributes without end, or whatever a comparison raises
        return False
