"""An epoch from its middle on gives what the whole epoch gives there."""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)  # fmt: skip

from timm_mamba_pkd.distillation.views import Views
from timm_mamba_pkd.runner.batches import Batches


class Noisy(Dataset):
    """Samples whose augmentation draws from torch's and NumPy's global generators."""

    def __init__(self, size: int = 21) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int, dict[str, Any]]:
        return index + torch.rand(1, 2, 2) * np.random.rand(), index % 3, {}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.rand(1, 2, 2), 0, {}) for _ in range(12)])


def random_sampler(dataset: Any) -> Any:
    return RandomSampler(dataset)


def with_generator(dataset: Any) -> Any:
    return RandomSampler(dataset, generator=torch.Generator().manual_seed(5))


def with_replacement(dataset: Any) -> Any:
    return WeightedRandomSampler([1.0] * len(dataset), 17)


LOADERS: dict[str, Callable[[], DataLoader]] = {
    "in order": lambda: DataLoader(Noisy(), 4),
    "random": lambda: DataLoader(Noisy(), 4, sampler=random_sampler(Noisy())),
    "drop last": lambda: DataLoader(Noisy(), 4, sampler=random_sampler(Noisy()), drop_last=True),
    "generator": lambda: DataLoader(Noisy(), 4, sampler=with_generator(Noisy())),
    "loader's generator": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "weighted": lambda: DataLoader(Noisy(), 4, sampler=with_replacement(Noisy())),
    "batch sampler": lambda: DataLoader(Noisy(), batch_sampler=[[3, 1], [0], [7, 8, 9], [4, 4]]),  # type: ignore
    "workers": lambda: DataLoader(Noisy(), 4, sampler=random_sampler(Noisy()), num_workers=2),
    "views": lambda: DataLoader(Views(Noisy(), 3), 4, sampler=random_sampler(Noisy()), num_workers=2),
    "stream": lambda: DataLoader(Stream(), 4),
}  # fmt: skip


def train(batches: Batches, done: int = 0, after: Any = None, until: int = 10**9) -> tuple[list[Any], int, Any]:
    """What "training" on an epoch up to ``until`` samples sees: the images, and a number drawn in each step."""
    seen = []
    for (images, targets, _), indices in batches.epoch(done, after):
        seen.append((images, targets, indices, torch.rand(())))
        done += len(targets)
        if done >= until:
            break
    return seen, done, batches.random_state()


@pytest.mark.parametrize("kind", LOADERS)
def test_from_the_middle_on(kind):
    """Two epochs, each of them interrupted in the middle, against two that are not."""

    def two_epochs(cut: int | None) -> list[Any]:
        torch.manual_seed(0)
        np.random.seed(0)
        seen, batches = [], Batches(LOADERS[kind]())
        for _ in range(2):
            start = batches.random_state()
            if cut is None:
                seen += train(batches)[0]
                continue
            first, done, after = train(batches, until=cut)
            torch.manual_seed(99)
            np.random.seed(99)
            batches = Batches(LOADERS[kind]())
            batches.set_random_state(start)
            seen += first + train(batches, done, after)[0]
        return seen

    whole = two_epochs(None)
    for cut in (1, 7, 100):  # in the first batch, the second, after the last
        parts = two_epochs(cut)
        assert len(parts) == len(whole)
        for one, other in zip(whole, parts, strict=True):
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("kind", ["random", "workers", "drop last", "batch sampler"])
def test_a_whole_epoch_is_that_of_the_loader(kind):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = [images for images, *_ in LOADERS[kind]()]
    torch.manual_seed(0)
    np.random.seed(0)
    batches = Batches(LOADERS[kind]())
    assert len(batches) == len(expected)
    for image, ((images, _, _), indices) in zip(expected, batches.epoch(), strict=True):
        assert torch.equal(image, images)
        assert images.flatten(1).min(1).values.int().tolist() == indices  # the noise is below 1


def test_nothing_is_loaded_twice_with_views():
    loaded = []

    class Counting(Noisy):
        def __getitem__(self, index: int) -> Any:
            loaded.append(index)
            return super().__getitem__(index)

    dataset = Views(Counting(), 2)
    batches = Batches(DataLoader(dataset, 4, sampler=SequentialSampler(dataset)))
    train(batches, done=16, after=batches.random_state())
    assert loaded == [16, 17, 18, 19, 20]


def test_a_batch_sampler_of_ones_own_is_kept():
    class Own(BatchSampler):
        def __iter__(self) -> Any:
            return iter([[0, 2], [1]])

    batches = Batches(DataLoader(Noisy(), batch_sampler=Own(SequentialSampler(Noisy()), 2, False)))
    assert [indices for _, indices in batches.epoch()] == [[0, 2], [1]]
    assert [indices for _, indices in batches.epoch(2, batches.random_state())] == [[1]]


def drawn(loader: DataLoader, monkeypatch: pytest.MonkeyPatch, world: int, done: int = 0) -> tuple[list, list[int]]:
    """The steps of an epoch, each with the indices of every process, and how far the order has gone after each."""
    parts, counts = [], []
    for rank in range(world):
        for name, value in (("world", world), ("rank", rank), ("is_main", True)):
            monkeypatch.setattr(f"timm_mamba_pkd.runner.batches.{name}", lambda value=value: value)
        torch.manual_seed(3)  # broadcast by hand
        batches = Batches(loader)
        own = [(indices if rank < batches.present else [], batches.done) for _, indices in batches.epoch(done)]
        assert done > 0 or len(own) == len(batches)
        parts.append([indices for indices, _ in own])
        counts.append([count for _, count in own])
    assert all(count == counts[0] for count in counts)
    return list(zip(*parts, strict=True)), counts[0]


def in_order(step: Any) -> list[int]:
    """The indices of a step's shares, as the sampler gave them."""
    return [index for turn in zip_longest(*step) for index in turn if index is not None]


@pytest.mark.parametrize("kind", ["in order", "random", "drop last", "weighted"])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_order_of_one(kind, world, monkeypatch):
    order = [index for (step,) in drawn(LOADERS[kind](), monkeypatch, 1)[0] for index in step]
    steps, counts = drawn(LOADERS[kind](), monkeypatch, world)
    together = [in_order(step) for step in steps]
    flat = [index for step in together for index in step]
    assert flat == order[: len(flat)] and counts[-1] == len(flat), "none twice"
    if kind == "drop last":
        assert all(len(step) == 4 * world for step in together)
        assert len(order) - len(flat) < 4 * world
        return
    assert len(flat) == len(order)
    for step in steps:
        sizes = [len(share) for share in step]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_whole_batches(world, monkeypatch):
    """Each takes one; where none is left, what rank 0 takes, and it does not count."""
    loader = LOADERS["batch sampler"]()
    steps, counts = drawn(loader, monkeypatch, world)
    batches = list(loader.batch_sampler)  # type: ignore
    assert [share for step in steps for share in step if share] == batches
    assert counts[-1] == sum(map(len, batches))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_another_number_of_processes_goes_on_in_the_same_order(before, after, monkeypatch):
    counts = drawn(LOADERS["random"](), monkeypatch, before)[1]
    order = [index for (step,) in drawn(LOADERS["random"](), monkeypatch, 1)[0] for index in step]
    for done in counts[:-1]:
        rest, _ = drawn(LOADERS["random"](), monkeypatch, after, done)
        seen = [index for step in rest for index in in_order(step)]
        assert seen == order[done:], "nothing twice, nothing left out"
