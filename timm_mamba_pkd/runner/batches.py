"""The training batches of an epoch, from any point of it on."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from timm_mamba_pkd.distillation.views import Views
from timm_mamba_pkd.runner.random_state import RandomState, random_state, set_random_state


class Batches:
    """The batches of one of torchdistill's data loaders, in the order of its own sampler.

    An epoch can begin after its first samples, as one that was interrupted does: the batches from there on are those
    of the whole epoch, bit for bit. Where worker processes draw augmentations from generators of their own, the
    batches before are loaded and dropped, which brings the workers to the same state (but for ``persistent_workers``,
    whose generators go on from epoch to epoch). `Views`, and loaders without workers, load nothing twice.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        streams = loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset)
        self._replays = streams or (loader.num_workers > 0 and not isinstance(loader.dataset, Views))
        self._order = None if streams else _Order(loader.batch_sampler)
        self._ordered = loader if self._order is None else _with_order(loader, self._order)
        sources = (loader, loader.sampler, loader.batch_sampler)
        found = {id(g): g for source in sources if (g := getattr(source, "generator", None)) is not None}
        self._generators = list(found.values())

    def __len__(self) -> int:
        return len(self.loader)

    def random_state(self) -> RandomState:
        """The state of the global generators, and of those of the loader's own."""
        return random_state(self._generators)

    def set_random_state(self, state: RandomState) -> None:
        """Go back to a state of `random_state`."""
        set_random_state(state, self._generators)

    def epoch(self, done: int = 0, after: RandomState | None = None) -> Iterator[tuple[Any, list[int] | None]]:
        """(batch, indices of its samples, None if unknown), from sample number ``done`` of the epoch on.

        Args:
            done: how many samples to pass over; the generators are in their state at the epoch's start.
            after: the state to go on from, when these samples had been trained on.
        """
        left = done if self._replays else 0
        if self._order is not None:
            self._order.begin(done - left, None if left or after is None else lambda: self.set_random_state(after))
        for batch in self._ordered:
            indices = None if self._order is None else self._order.given.popleft()
            if left > 0:
                left -= len(batch[1])
                if left <= 0 and after is not None:
                    self.set_random_state(after)
            else:
                yield batch, indices


class _Order:
    """A batch sampler that leaves out the first samples of another one's next epoch."""

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler
        self.given: deque[list[int]] = deque()  # batches that were not yet trained on
        self.begin(0, None)

    def begin(self, done: int, then: Any) -> None:
        """Leave out ``done`` samples of the next epoch; ``then`` is called when the order is drawn."""
        self.given.clear()
        self._done, self._then = done, then

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._remaining()
        if self._then is not None:
            self._then()
        for batch in batches:
            self.given.append(batch)
            yield batch

    def _remaining(self) -> list[list[int]]:
        if type(self.batch_sampler) is not BatchSampler:
            batches, done = list(self.batch_sampler), 0
            while done < self._done:
                done += len(batches.pop(0))
            return batches
        order, size = list(self.batch_sampler.sampler)[self._done :], self.batch_sampler.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if self.batch_sampler.drop_last and batches and len(batches[-1]) < size:
            batches.pop()
        return batches


def _with_order(loader: DataLoader, order: _Order) -> DataLoader:
    """The same loader with another order."""
    return DataLoader(
        loader.dataset,
        batch_sampler=order,  # pyright: ignore[reportArgumentType]
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        pin_memory_device=loader.pin_memory_device,
        in_order=loader.in_order,
    )
