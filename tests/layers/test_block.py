import pytest
import torch
from torch import Tensor

from timm_mamba_pkd.layers import MambaBlock


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_block(drop_path: float = 0.0) -> MambaBlock:
    block = MambaBlock(8, d_state=4, expand=1.5, drop_path=drop_path).eval()
    block.norm.weight.data.uniform_(0.5, 2)
    block.norm.bias.data.normal_()
    for conv in (block.local.expand, block.local.depthwise, block.local.project):
        conv.norm.get_buffer("running_mean").normal_()
        conv.norm.get_buffer("running_var").uniform_(0.5, 2)
    return block


def branches(block: MambaBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    """The residual branches' outputs, the second computed after the first has been added."""
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm.weight + block.norm.bias
    first = block.mixer(normal)
    hidden = (x + first).permute(0, 3, 1, 2)
    for conv in (block.local.expand, block.local.depthwise, block.local.project):
        hidden = conv(hidden)
    return first, hidden.permute(0, 2, 3, 1)


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1), (1, 6)])
def test_block_is_two_residual_branches(size):
    block = make_block()
    assert block.mixer.d_inner == 12
    assert block.mixer.d_state == 4
    assert block.local.depthwise.conv.groups == 16
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


def test_drop_path_drops_each_branch():
    block = make_block(drop_path=0.5)
    x = torch.randn(200, 2, 2, 8)
    first, second = branches(block, x)
    torch.testing.assert_close(block(x), x + first + second)
    block.drop_path.train()  # batch norms stay in eval mode
    block.local.drop_path.train()
    y = block(x) - x
    both_dropped = (y.abs() < 1e-6).flatten(1).all(1)
    mixer_alone = torch.isclose(y, 2 * first, atol=1e-5).flatten(1).all(1)
    assert 25 < both_dropped.sum() < 75  # a quarter
    assert 25 < mixer_alone.sum() < 75


def test_device_and_dtype():
    block = MambaBlock(8, 4, 1.0, device="meta", dtype=torch.float64)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float64}
    assert block(torch.empty(2, 3, 5, 8, device="meta", dtype=torch.float64)).shape == (2, 3, 5, 8)
