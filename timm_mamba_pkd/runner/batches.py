"""The training batches of an epoch, from any point of it on."""

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from timm_mamba_pkd.distillation.views import Views
from timm_mamba_pkd.distributed import broadcast, is_main, rank, with_batches, world
from timm_mamba_pkd.runner.random_state import RandomState, random_state, set_random_state


class Batches:
    """The batches of one of torchdistill's data loaders, in the order of its own sampler.

    An epoch can begin after its first samples, as one that was interrupted does: the batches from there on are those
    of the whole epoch, bit for bit. Where worker processes draw augmentations from generators of their own, the
    batches before are loaded and dropped, which brings the workers to the same state (but for ``persistent_workers``,
    whose generators go on from epoch to epoch). `Views`, and loaders without workers, load nothing twice.

    Among several processes rank 0 draws the order. Each step takes as many samples from it as all processes together
    have room for in a batch, and rank r of W every W-th of them from the r-th on; where they do not divide, some have
    one sample more than others. (Of another sampler of whole batches each process takes one per step.) A process for
    which nothing is left takes what rank 0 does, to keep step: it is not one of those ``present``.

    Attributes:
        done: how many samples of the present epoch, of all processes, have been through.
        present: how many processes, the first ones, have samples of their own in the present step.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.done = 0
        self.present = world()
        streams = loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset)
        self._replays = streams or (loader.num_workers > 0 and not isinstance(loader.dataset, Views))
        self._order = None if streams else _Order(loader.batch_sampler)
        self._ordered = loader if self._order is None else with_batches(loader, self._order)
        sources = (loader, loader.sampler, loader.batch_sampler)
        found = {id(g): g for source in sources if (g := getattr(source, "generator", None)) is not None}
        self._generators = list(found.values())

    def __len__(self) -> int:
        return len(self._ordered)

    def random_state(self) -> RandomState:
        """The state of the global generators, and of those of the loader's own."""
        return random_state(self._generators)

    def set_random_state(self, state: RandomState) -> None:
        """Go back to a state of `random_state`."""
        set_random_state(state, self._generators)

    def epoch(
        self, done: int = 0, after: RandomState | None = None, replay: bool = True
    ) -> Iterator[tuple[Any, list[int] | None]]:
        """(batch, indices of its samples, None if unknown), from sample number ``done`` of the epoch on.

        Args:
            done: how many samples to pass over; the generators are in their state at the epoch's start.
            after: the state to go on from, when these samples had been trained on.
            replay: whether they were loaded here before, by equally many processes.
        """
        left = done if self._order is None or (self._replays and replay) else 0
        self.done = done - left
        if self._order is not None:
            self._order.begin(self.done, None if left or after is None else lambda: self.set_random_state(after))
        for batch in self._ordered:
            if self._order is None:
                indices, count = None, len(batch[1]) * world()
            else:
                indices, count, self.present = self._order.given.popleft()
            replayed = self.done < done
            self.done += count
            if not replayed:
                yield batch, indices
            elif self.done >= done and after is not None:
                self.set_random_state(after)


class _Order:
    """A batch sampler that leaves out the first samples of another one's next epoch, and takes this process's share."""

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler: Any = batch_sampler
        self._whole_batches = type(batch_sampler) is not BatchSampler
        self.given: deque[_Share] = deque()  # what was not yet trained on
        self.begin(0, None)

    def begin(self, done: int, then: Any) -> None:
        """Leave out ``done`` samples of the next epoch; ``then`` is called when the order is drawn."""
        self.given.clear()
        self._done, self._then = done, then

    def __len__(self) -> int:
        if self._whole_batches:
            return math.ceil(len(self.batch_sampler) / world())
        steps = len(self.batch_sampler.sampler) / (self.batch_sampler.batch_size * world())
        return math.floor(steps) if self.batch_sampler.drop_last else math.ceil(steps)

    def __iter__(self) -> Iterator[list[int]]:
        source = self.batch_sampler if self._whole_batches else self.batch_sampler.sampler
        drawn = broadcast(list(source) if is_main() else [])
        if self._then is not None:
            self._then()
        for share in self._shared_batches(drawn) if self._whole_batches else self._shares(drawn):
            self.given.append(share)
            yield share[0]

    def _shares(self, order: list[int]) -> Iterator["_Share"]:
        together = self.batch_sampler.batch_size * world()
        for start in range(self._done, len(order), together):
            step = order[start : start + together]
            if len(step) < together and self.batch_sampler.drop_last:
                return
            yield step[rank() :: world()] or step[:1], len(step), min(len(step), world())

    def _shared_batches(self, batches: list[list[int]]) -> Iterator["_Share"]:
        start = passed = 0
        while passed < self._done:
            passed += len(batches[start])
            start += 1
        for first in range(start, len(batches), world()):
            step = batches[first : first + world()]
            yield step[rank() if rank() < len(step) else 0], sum(map(len, step)), len(step)


_Share = tuple[list[int], int, int]  # indices of this process's samples, how many all have, and `Batches.present`
