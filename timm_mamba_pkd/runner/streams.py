"""Data sets without an index, such as timm's ``wds/`` and ``hfids/``: made safe to read, and their loaders told so."""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from timm_mamba_pkd.distillation.views import STREAM, VIEWS
from timm_mamba_pkd.runner.errors import ConfigError, Keys
from timm_mamba_pkd.runner.unreadable import Readable, UnreadableError, say


class ReadableStream(IterableDataset):
    """An iterable data set; every pass over it starts anew, whoever has read it before.

    timm's readers decide at their first sample which shards are whose, so each pass gets a reader of its own. The ranks
    of a training, and the workers of each, read different shards; in an evaluation every rank reads everything, as
    timm's way to share it leaves some samples out and reads others twice. Other attributes are those of the data set.

    Args:
        dataset: with a length.
        name: of the data set, for people.
        training: whether to share it between the ranks; torch.distributed must be initialized by now.

    Attributes:
        num_samples: of all ranks together.
        shuffled: False reads it in its own order, for a look at a few samples.
    """

    def __init__(self, dataset: Any, name: str, training: bool) -> None:
        self.dataset = dataset
        self.name = name
        self.shuffled = True
        self._epoch = 0
        reader: Any = getattr(dataset, "reader", None)
        self.num_samples: int = getattr(reader, "num_samples", None) or len(dataset)
        self._counts_itself = training
        if hasattr(reader, "dist_num_replicas"):
            shared = training and dist.is_available() and dist.is_initialized()
            reader.dist_rank = dist.get_rank() if shared else 0
            reader.dist_num_replicas = dist.get_world_size() if shared else 1

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in vars(self):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset) if self._counts_itself else self.num_samples

    def __iter__(self) -> Iterator[Any]:
        dataset = copy.copy(self.dataset)
        if hasattr(dataset, "reader"):
            reader = dataset.reader = copy.copy(dataset.reader)
            reader.is_training = self.shuffled and reader.is_training
            if get_worker_info() is None and hasattr(reader, "worker_seed"):
                reader.worker_seed = reader.common_seed + self._epoch  # those of workers differ in each epoch
        try:
            yield from dataset
        except Exception as error:
            raise UnreadableError(f"data set '{self.name}' cannot be read on ({say(error)})") from error

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew."""
        self._epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def open_stream(dataset: Any, name: str, loader: dict[str, Any], at: Keys, training: bool) -> ReadableStream:
    """A stream for ``loader``, a config of torchdistill's, which is completed: it takes no sampler.

    Raises:
        ConfigError: the loader has parts that need an index; the number of samples is not known; an evaluation would
            read a shuffled stream, or a training have more workers than there are shards.
    """
    where = f"{'.'.join(at)}: data set '{name}' is read as a stream"
    sampler = loader.get("sampler") or {"class_or_func": no_sampler}
    if sampler["class_or_func"] is not no_sampler:
        raise ConfigError(
            f"{where}, which takes no sampler: remove it; its is_training: True shuffles", (*at, "sampler")
        )
    wrapper = (loader.get("dataset_wrapper") or {"key": STREAM})["key"]
    for key in ("batch_sampler", "dataset_wrapper"):
        if loader.get(key) and not (key == "dataset_wrapper" and wrapper in (STREAM, VIEWS)):
            raise ConfigError(f"{where}, which takes no {key}: remove it", (*at, key))
    reader: Any = getattr(dataset, "reader", None)
    shuffles = getattr(reader, "is_training", None)
    if shuffles and not training:
        raise ConfigError(
            f"{where} with is_training: True: an evaluation would be inexact; remove it", ("datasets", name)
        )
    if not getattr(reader, "num_samples", None) and not _length(dataset):
        raise ConfigError(f"{where}, which does not tell its length: give its num_samples", ("datasets", name))
    kwargs = loader["kwargs"]
    workers = max(1, kwargs.get("num_workers") or 0)
    stream = ReadableStream(dataset, name, training)
    if training and hasattr(reader, "batch_size"):
        reader.batch_size = kwargs.get("batch_size") or 1  # timm fills the last batch of every worker
    if hasattr(dataset, "set_loader_cfg"):
        dataset.set_loader_cfg(num_workers=workers)
    shards = len(getattr(getattr(reader, "split_info", None), "filenames", None) or ())
    readers = workers * getattr(reader, "dist_num_replicas", 1)
    if training and shards and shards < readers:
        message = f"{where} of {shards} shards, too few for {readers} workers (of all processes): lower num_workers"
        raise ConfigError(message, (*at, "kwargs", "num_workers"))
    loader["sampler"] = sampler
    if at[-1] == "train_data_loader":
        loader.setdefault("dataset_wrapper", {"key": STREAM})
    return stream


def no_sampler(dataset: Any) -> None:
    """torchdistill asks for a sampler, which PyTorch wants None for a stream."""


def start_epoch(loader: DataLoader | None, epoch: int) -> None:
    """Have the stream that ``loader`` reads, if it is one, shuffled as for epoch ``epoch`` of the run."""
    stream: Any = getattr(loader, "dataset", None)
    if isinstance(stream, IterableDataset):
        stream.org_dataset.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]


def first_samples(dataset: Any, count: int) -> list[Any]:
    """The first samples, at most ``count``, of a data set of either kind."""
    if isinstance(dataset, IterableDataset):
        return list(islice(unshuffled(dataset), count))
    return [dataset[i] for i in range(min(count, len(dataset)))]


def public_class(dataset: Any) -> type:
    """The class of a data set of a config, which the runner has wrapped."""
    dataset = dataset.dataset if isinstance(dataset, (Readable, ReadableStream)) else dataset
    return next(cls for cls in type(dataset).__mro__ if not cls.__name__.startswith("_"))


def unshuffled(dataset: Any) -> Any:
    """A stream, within a wrapper or not, in its own order: its first samples come without filling a buffer."""
    dataset = copy.copy(dataset)
    if isinstance(dataset, ReadableStream):
        dataset.shuffled = False
    elif hasattr(dataset, "org_dataset"):
        dataset.org_dataset = unshuffled(dataset.org_dataset)
    return dataset


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        return 0
