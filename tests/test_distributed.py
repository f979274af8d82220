"""Processes that work together, and the absence of all of it in a single one."""

import multiprocessing
import socket
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from timm_mamba_pkd import distributed


def test_two_processes(monkeypatch):
    """`ranks.py` says what they check."""
    monkeypatch.syspath_prepend(Path(__file__).parent)  # which the processes inherit
    from ranks import check_all

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["ranks"])  # imported once
    torch.multiprocessing.start_processes(check_all, (2, port), nprocs=2, start_method="forkserver")


@pytest.mark.parametrize("missing", [*distributed.VARIABLES, "one process"])
def test_only_torchruns_full_set_counts(monkeypatch, missing):
    for name in distributed.VARIABLES:
        monkeypatch.setenv(name, "2")
    assert distributed.launched()
    if missing == "one process":
        monkeypatch.setenv("WORLD_SIZE", "1")
    else:
        monkeypatch.delenv(missing)
    assert not distributed.launched() and distributed.local_rank() == 0
    with distributed.process_group(torch.device("cpu")):
        assert distributed.world() == 1 and not torch.distributed.is_initialized()


def test_a_single_process_changes_nothing():
    loader = DataLoader(range(5), batch_size=2)  # pyright: ignore[reportArgumentType]
    parameter, value = nn.Parameter(torch.ones(2)), object()
    parameter.grad = gradient = torch.ones(2)
    assert distributed.share_of(loader) is loader
    assert distributed.broadcast(value) is value and distributed.gather(value) == [value]
    assert distributed.all_sum(gradient) is gradient and distributed.gather_numbers([1, 2]) == [[1, 2]]
    distributed.average_gradients([parameter])
    distributed.broadcast_tensors([parameter])
    assert parameter.grad is gradient and gradient.tolist() == [1, 1]
    with pytest.raises(ValueError, match="mine"), distributed.failing_together(ValueError):
        raise ValueError("mine")
