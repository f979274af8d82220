"""Processes that work on one run together, as torchrun starts them. In a single process all of this does nothing."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, IterableDataset

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets. Schedulers and shells set some of them without starting processes that know each other."""


class ProcessEnded(RuntimeError):
    """A process of the run cannot be reached: it has ended, so that the others cannot go on."""


class SaidByMain(Exception):
    """An error that the main process says."""


class _State:
    together = False  # between init_process_group and its end, if it was ours
    present: int | None = None  # of `only_first`


_state = _State()


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return all(os.environ.get(name) for name in VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _state.together else 0


def world() -> int:
    """The number of processes."""
    return distributed.get_world_size() if _state.together else 1


def is_main() -> bool:
    """Whether this is the process that writes and speaks, rank 0."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """In this context the processes that torchrun started work together; all but rank 0 log warnings and errors only.

    Tensors on the CPU and plain objects go by gloo, tensors on GPUs by NCCL.

    Raises:
        ProcessEnded: the others cannot be reached.
    """
    if not launched():
        yield
        return
    with _reaching_others():
        if device.type == "cuda":
            torch.cuda.set_device(device)
            distributed.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            distributed.init_process_group("gloo")
    _state.together = True
    logging.disable(logging.NOTSET if is_main() else logging.INFO)
    yield
    _state.together = False  # after an error nobody may be left to end it with
    distributed.destroy_process_group()


@contextmanager
def only_first(number: int) -> Iterator[None]:
    """In this context the first ``number`` processes alone have data; what the others do keeps step, but is no part of
    the result."""
    _state.present = number
    try:
        yield
    finally:
        _state.present = None


def is_present() -> bool:
    """Whether this process has data, see `only_first`."""
    return _state.present is None or rank() < _state.present


def all_present() -> bool:
    """Whether every process has data, see `only_first`."""
    return _state.present is None or world() <= _state.present


@contextmanager
def failing_together(kind: type[Exception]) -> Iterator[None]:
    """An error of this kind, whichever process has it, ends this context in all of them.

    The main process raises it and the others `SaidByMain`. No collective operation may stand inside.
    """
    if world() == 1:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except kind as error:
        mine = error
    messages = gather(None if mine is None else str(mine))
    where = next((i for i, message in enumerate(messages) if message is not None), None)
    if where is None:
        return
    message = str(messages[where]) if where == 0 else f"on rank {where}: {messages[where]}"
    if not is_main():
        raise SaidByMain(message) from mine
    raise mine or kind(message)


def broadcast(value: T) -> T:
    """Rank 0's plain object, in all processes."""
    if world() == 1:
        return value
    values = [value]
    with _reaching_others():
        distributed.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def gather(value: T) -> list[T]:
    """The plain objects of all processes by rank, in all processes."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    with _reaching_others():
        distributed.all_gather_object(values, value)
    return values


def gather_numbers(numbers: Sequence[float]) -> list[list[float]]:
    """The numbers, equally many, of all processes by rank; one small message, which waits for no GPU."""
    if world() == 1:
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=torch.float64)
    everyones = [torch.empty_like(mine) for _ in range(world())]
    with _reaching_others():
        distributed.all_gather(everyones, mine)
    return [numbers.tolist() for numbers in everyones]


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, of one shape."""
    if world() > 1:
        tensor = tensor.clone()
        with _reaching_others():
            distributed.all_reduce(tensor)
    return tensor


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Make the gradients their means over all processes; none where no process has one."""
    if world() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    has = torch.tensor([p.grad is not None for p in trained], dtype=torch.float32, device=trained[0].device)
    gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained]
    flat = all_sum(torch.cat([*gradients, has])) / world()
    *means, has = flat.split([*(p.numel() for p in trained), len(trained)])
    for parameter, mean, anywhere in zip(trained, means, has.tolist(), strict=True):
        if anywhere:
            parameter.grad = torch.empty_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad.copy_(mean.view_as(parameter))


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Make the tensors, of any dtypes and devices, those of rank 0."""
    if world() == 1:
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        by_device.setdefault(tensor.device, []).append(tensor)
    for together in by_device.values():
        parts = [tensor.contiguous().flatten().view(torch.uint8) for tensor in together]
        flat = torch.cat(parts)
        with _reaching_others():
            distributed.broadcast(flat, src=0)
        for tensor, own in zip(together, flat.split([len(part) for part in parts]), strict=True):
            tensor.copy_(own.clone().view(tensor.dtype).view(tensor.shape))


def share_of(loader: DataLoader) -> Iterable[Any]:
    """This process's share of a loader's batches: of every ``world()`` consecutive ones, the one of its rank.

    Together they are the batches of a single process, none twice; rank 0 draws their order. `in_order` puts what the
    processes made of them back into it.
    """
    if world() == 1:
        return loader
    if isinstance(loader.dataset, IterableDataset):
        return islice(loader, rank(), None, world())
    if loader.batch_sampler is not None:
        return with_batches(loader, _Share(loader.batch_sampler))
    return with_batches(loader, _Share(loader.sampler), "sampler")


def in_order(parts: Sequence[Sequence[T]]) -> list[T]:
    """The results of all batches in the order of the loader, from those of the shares by rank."""
    missing = object()
    return [result for turn in zip_longest(*parts, fillvalue=missing) for result in turn if result is not missing]  # pyright: ignore[reportReturnType]


def with_batches(loader: DataLoader, batches: Any, kind: str = "batch_sampler") -> DataLoader:
    """The same loader with another batch sampler, or, of a loader without batches, with another ``sampler``."""
    how: dict[str, Any] = {kind: batches} if kind == "batch_sampler" else {kind: batches, "batch_size": None}
    return DataLoader(
        loader.dataset,
        **how,
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


class _Share:
    """What a sampler gives to this process."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(range(rank(), len(self.sampler), world()))

    def __iter__(self) -> Iterator[Any]:
        yield from broadcast(list(self.sampler) if is_main() else [])[rank() :: world()]


class AllReduce(torch.autograd.Function):
    """The sum of the processes' tensors, with the sum of their gradients as gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_sum(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_sum(gradient.contiguous())


@contextmanager
def _reaching_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that gloo and NCCL raise
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise ProcessEnded(f"another process of the run has ended, or cannot be reached ({reason})") from error
