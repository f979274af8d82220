"""Samples that cannot be read: in training named, counted and replaced, up to a limit; anywhere else an error."""

import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, get_worker_info

from timm_mamba_pkd.distillation.views import seeded
from timm_mamba_pkd.distributed import failing_together, gather, world
from timm_mamba_pkd.runner.errors import ConfigError, first_line
from timm_mamba_pkd.runner.progress import progress

logger = logging.getLogger(__name__)

T = TypeVar("T")

TOLERATED_SHARE, TOLERATED_ANYWAY = 0.001, 10
"""A training goes on without so many of its samples: this share of them, or this number if it is larger."""


class UnreadableError(ConfigError):
    """A sample cannot be read, and nothing takes its place.

    Also where it comes from a worker process of a DataLoader, which wraps it in a traceback, the message is one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rsplit(f"{UnreadableError.__name__}: ", 1)[-1])


class Readable(Dataset):
    """A map-style data set whose unreadable samples do not pass unnoticed.

    In training the next sample that can be read takes the place of one that cannot, as timm has it: always the same
    one, and no random number is drawn for it. `report` names them, also those that worker processes met. Above a limit,
    and in an evaluation always, it is an error. Other attributes are those of the data set.

    Args:
        dataset: with a length; timm's ImageDataset within it no longer takes the next sample by itself.
        name: of the data set, for people.
        training: whether samples may be replaced.
    """

    def __init__(self, dataset: Any, name: str, training: bool) -> None:
        _raise_in_timm(dataset)
        self.dataset = dataset
        self.name = name
        self.training = training
        limit = max(TOLERATED_ANYWAY, int(TOLERATED_SHARE * len(dataset))) if training else 0
        self.limit = min(limit, len(dataset) - 1)
        # Which samples are known as unreadable, and whether there are new ones; worker processes see and change both.
        self._unreadable = torch.zeros(len(dataset) if training else 1, dtype=torch.bool).share_memory_()
        self._news = torch.zeros((), dtype=torch.bool).share_memory_()
        self._reported: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in vars(self):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """The data set's item.

        Raises:
            UnreadableError: it cannot be read, in an evaluation, or too many in training.
        """
        try:
            return self.dataset[index]
        except Exception as error:  # decoders raise what they like
            if isinstance(error, MemoryError) or not 0 <= index < len(self):
                raise
            return self._next(int(index), error)

    def report(self) -> None:
        """Log the unreadable samples that were found since the last call. For the main process."""
        if not self._news:
            return
        self._news.fill_(False)
        for index in self.unreadable:
            if index not in self._reported:
                self._reported.add(index)
                logger.warning(
                    "%s cannot be read (%s), the next sample takes its place: %d of %d in data set '%s' so far, "
                    "the run ends above %d",
                    file_of(self.dataset, index), self.reason(index) or "now it can be", len(self._reported), len(self),
                    self.name, self.limit,
                )  # fmt: skip

    def reason(self, index: int) -> str:
        """Why a sample cannot be read; empty where it can. No random number is drawn."""
        try:
            with seeded(0):
                self.dataset[index]
        except Exception as error:
            return say(error)
        return ""

    @property
    def unreadable(self) -> list[int]:
        """The samples that are known as unreadable."""
        return self._unreadable.nonzero().flatten().tolist()

    def note_others(self, indices: Iterable[int]) -> None:
        """Count what other processes could not read, and have named.

        Raises:
            UnreadableError: they are too many now.
        """
        self._reported.update(indices)
        self._unreadable[list(indices)] = True
        if (count := len(self.unreadable)) > self.limit:
            raise UnreadableError(
                f"{count} of {len(self)} samples of data set '{self.name}' cannot be read: repair them, or take them "
                "out of the data set"
            )

    def _next(self, index: int, error: Exception) -> Any:
        """The first readable sample after ``index``, which gave ``error``."""
        while True:
            self._note(index, error)
            index = (index + 1) % len(self)
            try:
                return self.dataset[index]
            except MemoryError:
                raise
            except Exception as another:
                error = another

    def _note(self, index: int, error: Exception) -> None:
        found = f"{file_of(self.dataset, index)} of data set '{self.name}' cannot be read ({say(error)})"
        if not self.training:
            raise UnreadableError(f"{found}: an evaluation leaves nothing out") from error
        if not self._unreadable[index]:
            self._unreadable[index] = True
            self._news.fill_(True)
        if (count := int(self._unreadable.sum())) > self.limit:
            raise UnreadableError(
                f"{found}, which makes {count} of {len(self)}: repair them, or take them out of the data set"
            ) from error


def reporting(datasets: dict[str, Any], batches: Iterable[T]) -> Iterator[T]:
    """``batches``; `report_unreadable` before each and at the end, also one by an error."""
    try:
        for batch in batches:
            report_unreadable(datasets)
            yield batch
    finally:
        report_unreadable(datasets)


def report_unreadable(datasets: dict[str, Any]) -> None:
    """Log what has been found in any of the data sets and not been logged."""
    for dataset in datasets.values():
        if isinstance(dataset, Readable):
            dataset.report()


def all_unreadable(dataset: Readable, workers: int) -> list[str]:
    """Each sample of ``dataset`` that cannot be read, and why: all are tried, by so many processes."""
    reasons = DataLoader(_Reasons(dataset), batch_size=None, num_workers=workers)
    return [reason for reason in progress(reasons, "looking for unreadable samples") if reason]


class _Reasons(Dataset):
    """For each sample of a data set its file and why it cannot be read; an empty string where it can."""

    def __init__(self, dataset: Readable) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str:
        reason = self.dataset.reason(index)
        return f"{file_of(self.dataset.dataset, index)} ({reason})" if reason else ""


def share_unreadable(datasets: dict[str, Any]) -> None:
    """Have all processes count what any of them could not read in training; an error in all if it is too much."""
    if world() == 1:
        return
    own = {name: data.unreadable for name, data in datasets.items() if isinstance(data, Readable) and data.training}
    everyones = gather(own)
    with failing_together(ConfigError):
        for name in own:
            datasets[name].note_others(sorted({index for found in everyones for index in found[name]}))


class _RaisingImageDataset(ImageDataset):
    """timm's, with an error where a sample cannot be read; timm's own logs it and gives the next sample."""

    def __getitem__(self, index: int) -> Any:
        reader: Any = self.reader
        if hasattr(reader, "cache_tarfiles"):  # an open file of the main process must not go to its workers
            reader.cache_tarfiles = get_worker_info() is not None
        image, target, *features = reader[index]
        if self.load_bytes:
            image = image.read()
        else:
            image = Image.open(image)
            if self.input_img_mode:
                image = image.convert(self.input_img_mode)
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return (image, target) if self.additional_features is None else (image, target, *features)


def _raise_in_timm(dataset: Any) -> None:
    """Have timm's data sets within ``dataset`` raise their errors. A subclass keeps its own ways."""
    if type(dataset) is ImageDataset:
        dataset.__class__ = _RaisingImageDataset
    for part in (getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or ())):
        if isinstance(part, Dataset):
            _raise_in_timm(part)


def file_of(dataset: Any, index: int) -> str:
    """The file of a sample, where the data set tells it; otherwise its number."""
    if isinstance(dataset, Subset):
        return file_of(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, ConcatDataset):
        part = bisect_right(dataset.cumulative_sizes, index)
        return file_of(dataset.datasets[part], index - [0, *dataset.cumulative_sizes][part])
    if isinstance(dataset, ImageDataset):
        return dataset.filename(index, absolute=True) or f"sample {index}"
    samples = getattr(dataset, "samples", None)  # torchvision's DatasetFolder
    return str(samples[index][0]) if isinstance(samples, list) else f"sample {index}"


def say(error: Exception) -> str:
    message = first_line(error) if str(error) else ""
    return first_line(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {message}"
