import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_mamba_pkd.layers import ConvNorm, Downsample, InvertedResidual


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomise_norms(module: nn.Module) -> nn.Module:
    """Statistics and weights that make a forgotten norm visible."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = torch.randn_like(norm.bias)
            norm.running_var = torch.rand_like(norm.bias) + 0.5
            norm.weight.data.uniform_(0.5, 2)
            norm.bias.data.normal_()
    return module.eval()


def conv_norm(x: Tensor, part: ConvNorm, stride: int = 1, groups: int = 1) -> Tensor:
    """Convolution and batch norm of channels-last x, one output pixel at a time."""
    weight, norm = part.conv.weight, part.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    k = weight.shape[-1]
    x = F.pad(x, (0, 0, k // 2, k // 2, k // 2, k // 2))
    rows = range(0, x.shape[1] - k + 1, stride)
    columns = range(0, x.shape[2] - k + 1, stride)
    windows = torch.stack([torch.stack([x[:, i : i + k, j : j + k] for j in columns], 1) for i in rows], 1)
    equation = "bhwklc,dckl->bhwd" if groups == 1 else "bhwkld,dckl->bhwd"
    y = torch.einsum(equation, windows, weight)
    return (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize(
    ("kernel_size", "stride", "groups", "act"), [(1, 1, 1, True), (3, 2, 1, False), (3, 1, 4, True)]
)
@pytest.mark.parametrize("size", [(6, 5), (1, 1)])
def test_conv_norm(kernel_size, stride, groups, act, size):
    part = ConvNorm(4, 4, kernel_size, stride, groups, act)
    randomise_norms(part)
    x = torch.randn(2, 4, *size)
    true = conv_norm(x.permute(0, 2, 3, 1), part, stride, groups).permute(0, 3, 1, 2)
    torch.testing.assert_close(part(x), F.silu(true) if act else true)
    assert [name for name, _ in part.named_parameters()] == ["conv.weight", "norm.weight", "norm.bias"]


@pytest.mark.parametrize(("out_dim", "stride"), [(4, 1), (5, 1), (4, 2), (6, 2)])
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)])
def test_inverted_residual(size, out_dim, stride):
    block = InvertedResidual(4, out_dim, stride, expand=1.5)
    randomise_norms(block)
    x = torch.randn(2, *size, 4)
    y = F.silu(conv_norm(x, block.expand))
    assert y.shape[-1] == 6
    y = conv_norm(F.silu(conv_norm(y, block.depthwise, stride, groups=6)), block.project)
    torch.testing.assert_close(block(x), x + y if (out_dim, stride) == (4, 1) else y)


@pytest.mark.parametrize(("size", "half"), [((4, 6), (2, 3)), ((3, 5), (2, 3)), ((1, 1), (1, 1)), ((2, 1), (1, 1))])
def test_downsample(size, half):
    part = Downsample(4, 6)
    randomise_norms(part)
    x = torch.randn(2, *size, 4)
    y = part(x)
    assert y.shape == (2, *half, 6)
    torch.testing.assert_close(y, conv_norm(conv_norm(x, part.depthwise, stride=2, groups=4), part.pointwise))


def test_drop_path_drops_the_branch_of_whole_samples():
    block, whole = InvertedResidual(4, 4, drop_path=0.25), InvertedResidual(4, 4)
    whole.load_state_dict(block.state_dict())
    x = torch.randn(400, 2, 2, 4)
    branch = whole(x) - x
    difference = block(x) - x
    dropped = (difference == 0).flatten(1).all(1)
    assert 60 < dropped.sum() < 140
    torch.testing.assert_close(difference[~dropped], branch[~dropped] / 0.75)
    randomise_norms(block)
    whole.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), whole.eval()(x))


@pytest.mark.parametrize("make", [lambda **dd: ConvNorm(4, 4, **dd), lambda **dd: InvertedResidual(4, 4, **dd)])
def test_device_and_dtype(make):
    part = make(device="meta", dtype=torch.float64)
    assert {parameter.dtype for parameter in part.parameters()} == {torch.float64}
    assert all(tensor.is_meta for tensor in part.state_dict().values())
    assert Downsample(4, 6, device="meta").pointwise.conv.weight.is_meta
