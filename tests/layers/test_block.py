from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_mamba_pkd.layers import MambaBlock


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_block(drop_path: float = 0.0) -> MambaBlock:
    block = MambaBlock(8, d_state=4, expand=1.5, mlp_ratio=2.5, drop_path=drop_path).eval()
    for norm in (block.norm1, block.norm2):
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.normal_()
    return block


def local(block: MambaBlock, x: Tensor) -> Tensor:
    """The depthwise convolution as nine shifted products."""
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    height, width = x.shape[1:3]
    taps = [
        block.local.weight[:, 0, i, j] * padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)
    ]
    assert block.local.bias is not None
    return torch.stack(taps).sum(0) + block.local.bias


def branches(block: MambaBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three residual branches' outputs, each computed after the one before has been added."""

    def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    mlp: Any = block.mlp
    first = local(block, x)
    second = block.mixer(normalise(x + first, block.norm1.weight, block.norm1.bias))
    hidden = normalise(x + first + second, block.norm2.weight, block.norm2.bias) @ mlp.fc1.weight.T
    hidden = hidden + mlp.fc1.bias
    assert hidden.shape[-1] == 20
    third = (hidden * hidden.sigmoid()) @ mlp.fc2.weight.T + mlp.fc2.bias
    return first, second, third


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1), (1, 6)])
def test_block_is_three_residual_branches(size):
    block = make_block()
    assert block.mixer.d_inner == 12
    assert block.mixer.d_state == 4
    x = torch.randn(2, *size, 8)
    torch.testing.assert_close(block(x), x + sum(branches(block, x)))


def test_every_token_sees_every_token():
    block = make_block().double()
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    for i in range(3):
        for j in range(4):
            (grad,) = torch.autograd.grad(block(x)[0, i, j].sum(), x)
            assert (grad != 0).any(-1).all(), (i, j)


def test_samples_do_not_mix():
    block = make_block()
    x = torch.randn(3, 2, 2, 8)
    torch.testing.assert_close(block(x), torch.cat([block(sample[None]) for sample in x]))


def test_drop_path_drops_mixer_and_mlp_but_not_the_convolution():
    block = make_block(drop_path=0.5)
    x = torch.randn(200, 2, 2, 8)
    first, second, third = branches(block, x)
    torch.testing.assert_close(block(x), x + first + second + third)
    y = block.train()(x) - x - first
    is_dropped = (y.abs() < 1e-6).flatten(1).all(1)
    has_mixer_alone = torch.isclose(y, 2 * second, atol=1e-5).flatten(1).all(1)
    assert 25 < is_dropped.sum() < 75  # both: a quarter
    assert 25 < has_mixer_alone.sum() < 75


def test_device_and_dtype():
    block = MambaBlock(8, 4, 1.0, 2.0, device="meta", dtype=torch.float64)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float64}
    assert block(torch.empty(2, 3, 5, 8, device="meta", dtype=torch.float64)).shape == (2, 3, 5, 8)
