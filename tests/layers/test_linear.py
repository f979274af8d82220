import pytest
import torch
import torch.nn.functional as F

from timm_mamba_pkd.layers.linear import Linear


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 5), (1, 7, 5), (64, 200, 24), (70000, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_linear(shape, bias):
    """As a matrix product and as a convolution, which the largest two are."""
    torch.manual_seed(0)
    layer, x = Linear(shape[-1], 16, bias=bias), torch.randn(shape, requires_grad=True)
    true = Linear(shape[-1], 16, bias=bias).double()
    true.load_state_dict(layer.state_dict())
    found, wanted = layer(x), F.linear(x.double(), true.weight, true.bias)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), [x, *layer.parameters()])
    theirs = torch.autograd.grad((wanted * weights).sum(), [x, *true.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-2)


def test_large_ones_are_convolutions():
    layer = Linear(24, 16)
    with torch.profiler.profile() as small:
        layer(torch.randn(2, 200, 24))
    with torch.profiler.profile() as large:
        layer(torch.randn(64, 200, 24))
    names = [{event.key for event in profile.key_averages()} for profile in (small, large)]
    assert ["aten::conv2d" in found for found in names] == [False, True]
