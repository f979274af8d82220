"""What the processes of `test_distributed.py` run; each checks its own results."""

import copy
import os
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_mamba_pkd import distributed
from timm_mamba_pkd.layers.sync_batch_norm import synchronize_batch_norms


def check_all(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    assert distributed.world() == 1 and distributed.is_main(), "not before they are together"
    with distributed.process_group(torch.device("cpu")):
        assert (distributed.rank(), distributed.world(), distributed.is_main()) == (rank, world, rank == 0)
        for check in (objects, errors, gradients, tensors, shares, batch_norms, left_out):
            check(rank, world)
    assert distributed.world() == 1


def objects(rank: int, world: int) -> None:
    assert distributed.broadcast({"from": rank}) == {"from": 0}
    assert distributed.gather(("of", rank)) == [("of", i) for i in range(world)]
    assert distributed.gather_numbers([rank, float("nan")])[1][0] == 1
    assert distributed.all_sum(torch.tensor([rank, 1])).tolist() == [sum(range(world)), world]


def errors(rank: int, world: int) -> None:
    with distributed.failing_together(ValueError):
        pass
    raised = ValueError if rank == 0 else distributed.SaidByMain
    for failing, message in (([1], "on rank 1: of 1"), ([0, 1], "of 0")):
        with pytest.raises(raised) as error, distributed.failing_together(ValueError):
            require(rank not in failing, f"of {rank}")
        assert str(error.value) == message
    with pytest.raises(KeyError), distributed.failing_together(ValueError):
        raise KeyError("another kind ends here")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def gradients(rank: int, world: int) -> None:
    """Of several shapes and layouts; one that only rank 0 has, one that none has, one that is frozen."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(2, 3), (4,), (), (5,), (6,)]]
    everywhere, on_zero, scalar, nowhere, frozen = parameters
    frozen.requires_grad_(False)
    everywhere.grad = torch.arange(6.0).view(3, 2).t() * (rank + 1)
    scalar.grad = torch.tensor(float(rank))
    if rank == 0:
        on_zero.grad = torch.ones(4)
    distributed.average_gradients(parameters)
    mean = sum(range(1, world + 1)) / world
    assert everywhere.grad.equal(torch.arange(6.0).view(3, 2).t() * mean)
    assert scalar.grad.item() == sum(range(world)) / world
    assert on_zero.grad is not None and on_zero.grad.equal(torch.ones(4) / world)
    assert nowhere.grad is None and frozen.grad is None


def tensors(rank: int, world: int) -> None:
    """Of any dtype, layout and emptiness."""
    values: list[torch.Tensor] = [
        torch.full((2, 3), rank), torch.full((), rank + 0.5), torch.tensor([rank == 0, True]), torch.zeros(0),
        torch.full((3,), rank, dtype=torch.bfloat16), torch.full((2, 4), float(rank)).t(),
        torch.full((1, 2, 3, 3), float(rank)).to(memory_format=torch.channels_last),
    ]  # fmt: skip
    distributed.broadcast_tensors([*values, values[0]])
    assert all((value == 0).all() for i, value in enumerate(values) if i not in (1, 2))
    assert values[1].item() == 0.5 and values[2].tolist() == [True, True]


def shares(rank: int, world: int) -> None:
    """Of loaders in order, shuffled, that drop the last batch, without batches: each batch once, as one process has."""
    data = TensorDataset(torch.arange(23))
    kinds: list[dict[str, Any]] = [
        {"batch_size": 4}, {"batch_size": 4, "shuffle": True}, {"batch_size": 4, "drop_last": True}, {"batch_size": 30},
        {"batch_size": None}, {"batch_size": 5, "num_workers": 1},
    ]  # fmt: skip
    for kind in kinds:
        torch.manual_seed(0)
        expected = [batch[0].tolist() for batch in DataLoader(data, **kind)]
        torch.manual_seed(rank)  # rank 0's is that of the single process
        own: Any = distributed.share_of(DataLoader(data, **kind))
        batches = [batch[0].tolist() for batch in own]
        assert len(own) == len(batches)
        assert distributed.in_order(distributed.gather(batches)) == expected, kind


def batch_norms(rank: int, world: int) -> None:
    """Outputs, gradients and statistics are those of one process with all images."""
    torch.manual_seed(0)
    images, weights = torch.randn(world * 3, 2, 4, 4) * 3 + 1, torch.randn(world * 3, 4)
    for norm in (nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None, affine=False), BatchNormAct2d(4)):
        model = nn.Sequential(nn.Conv2d(2, 4, 1), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        alone = copy.deepcopy(model)
        keys = list(model.state_dict())
        synchronize_batch_norms(model)
        for _ in range(2):
            (alone(images).square() * weights).sum().div(world).backward()
            own = slice(rank, None, world)
            output = model(images[own])
            (output.square() * weights[own]).sum().backward()
            torch.testing.assert_close(output, alone(images)[own], rtol=1e-4, atol=1e-5)
            model(images[own])  # as often as the other
        distributed.average_gradients(model.parameters())
        for parameter, truth in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, truth.grad, rtol=1e-4, atol=1e-4)
        assert list(model.state_dict()) == keys
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.eval()(images), alone.eval()(images), rtol=1e-4, atol=1e-5)


def left_out(rank: int, world: int) -> None:
    """A process without data is no part of the statistics, of the gradients of others, and of nothing else."""
    torch.manual_seed(0)
    images = torch.randn(3, 2, 4, 4)
    model: Any = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
    alone = copy.deepcopy(model)
    synchronize_batch_norms(model)
    alone(images).square().sum().mul(0.5).backward()
    assert distributed.is_present() and distributed.all_present()
    with distributed.only_first(1):
        assert distributed.is_present() == (rank == 0) and not distributed.all_present()
        (model(images if rank == 0 else images[:1]).square().sum() * (0.5 * world if rank == 0 else 0)).backward()
    distributed.average_gradients(model.parameters())
    for parameter, truth in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, truth.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.state_dict(), alone.state_dict())
