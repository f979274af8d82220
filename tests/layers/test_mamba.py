import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from timm_mamba_pkd.layers import Mamba

CONFIGS: list[dict[str, Any]] = [
    {"d_model": 32},
    {"d_model": 20, "d_state": 4, "expand": 1.0},
    {"d_model": 12, "d_state": 1, "d_conv": 2, "expand": 1.5, "dt_rank": 3},
    {"d_model": 1, "d_state": 5, "d_conv": 1},
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def differentiate(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of the module's parameters, of a fixed linear loss."""
    x = x.detach().requires_grad_()
    y = function(x)
    names, parameters = zip(*sorted(module.named_parameters()), strict=True)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    return dict(zip(("y", "x", *names), (y, *torch.autograd.grad(y, (x, *parameters), dy)), strict=True))


def assert_close(actual: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    """Equal to 1e-5 of the largest true value."""
    assert actual.keys() == true.keys()
    for name in true:
        assert (actual[name] - true[name]).abs().max() <= 1e-5 * true[name].abs().max(), name


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
def test_one_direction_is_mambapy(config, grid):
    mambapy = pytest.importorskip("mambapy.mamba")
    mixer = Mamba(**config, bidirectional=False)
    options = mambapy.MambaConfig(
        config["d_model"], n_layers=1, dt_rank=mixer.dt_rank, d_state=mixer.d_state, d_conv=mixer.d_conv
    )
    options.d_inner = mixer.d_inner
    theirs = mambapy.MambaBlock(options)
    theirs.load_state_dict(mixer.state_dict())
    x = torch.randn(2, *grid, config["d_model"])
    true = differentiate(lambda x: theirs(x.flatten(1, 2)).unflatten(1, grid), theirs, x)
    assert_close(differentiate(mixer, mixer, x), true)


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_one_direction_is_mamba_ssm(config):
    if not torch.cuda.is_available():
        pytest.skip("mamba-ssm needs a GPU")
    try:
        from mamba_ssm.modules.mamba_simple import Mamba as Theirs  # pyright: ignore[reportMissingImports]
    except Exception as reason:
        pytest.skip(f"mamba-ssm does not import: {reason!r}")
    mixer = Mamba(**config, bidirectional=False, device="cuda")
    theirs = Theirs(**config, device="cuda", use_fast_path=False)
    theirs.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 3, 5, config["d_model"], device="cuda")
    true = differentiate(lambda x: theirs(x.flatten(1, 2)).unflatten(1, (3, 5)), theirs, x)
    assert_close(differentiate(mixer, mixer, x), true)


def both_ways(mixer: Mamba, tokens: Tensor) -> Tensor:
    """Algorithm 2 of the paper, step by step, with its scan from either end: (L, C) in, same out."""
    x, z = (tokens @ mixer.in_proj.weight.T).chunk(2, 1)
    weight = mixer.conv1d.weight[:, 0]
    padded = torch.cat([x.new_zeros(mixer.d_conv - 1, mixer.d_inner), x])
    steps = range(len(tokens))
    x = torch.stack([(padded[t : t + mixer.d_conv] * weight.T).sum(0) for t in steps])
    x = nn.functional.silu(x + mixer.conv1d.bias)  # pyright: ignore[reportOperatorIssue]
    dt, B, C = (x @ mixer.x_proj.weight.T).split([mixer.dt_rank, mixer.d_state, mixer.d_state], 1)
    delta = torch.log1p(torch.exp(mixer.dt_proj(dt)))
    outputs = [2 * mixer.D * x[t] for t in steps]
    for order in (steps, reversed(steps)):
        h = x.new_zeros(mixer.d_inner, mixer.d_state)
        for t in order:
            decay = torch.exp(-delta[t, :, None] * torch.exp(mixer.A_log))
            h = decay * h + (delta[t] * x[t])[:, None] * B[t]
            outputs[t] = outputs[t] + h @ C[t]
    return (torch.stack(outputs) * nn.functional.silu(z)) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (1, 8)])
def test_two_directions_share_all_but_the_scan(config, grid):
    mixer = Mamba(**config, dtype=torch.float64)
    x = torch.randn(1, *grid, config["d_model"], dtype=torch.float64)
    true = differentiate(lambda x: both_ways(mixer, x.flatten(0, 2)).view_as(x), mixer, x)
    assert_close(differentiate(mixer, mixer, x), true)


def test_one_direction_is_causal_and_two_are_not():
    x = torch.randn(1, 3, 4, 8)
    changed = x.clone()
    changed[:, 1, 2] += 1
    for bidirectional in (False, True):
        mixer = Mamba(8, bidirectional=bidirectional)
        differs = (mixer(x) != mixer(changed)).any(-1).flatten()
        assert differs[6:].all()
        assert differs[:6].all() == bidirectional
        assert differs[:6].any() == bidirectional


def test_parameters_are_those_of_mamba_ssm():
    mixer = Mamba(40, d_state=6, d_conv=3, expand=1.5)
    assert {name: tuple(parameter.shape) for name, parameter in mixer.named_parameters()} == {
        "A_log": (60, 6),
        "D": (60,),
        "in_proj.weight": (120, 40),
        "conv1d.weight": (60, 1, 3),
        "conv1d.bias": (60,),
        "x_proj.weight": (3 + 2 * 6, 60),
        "dt_proj.weight": (60, 3),
        "dt_proj.bias": (60,),
        "out_proj.weight": (40, 60),
    }
    marked = {name for name, parameter in mixer.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_proj.bias"}


def test_initialisation():
    mixer = Mamba(256, d_state=6, dt_min=0.01, dt_max=0.2)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 7.0).expand(512, 6))
    assert (mixer.D == 1).all()
    dt = nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.01 <= dt.min() * 1.001 < 0.0115
    assert 0.17 < dt.max() <= 0.2 * 1.001
    assert dt.log().mean().item() == pytest.approx((math.log(0.01) + math.log(0.2)) / 2, abs=0.15)
    bound = mixer.dt_rank**-0.5
    assert 0.95 * bound < mixer.dt_proj.weight.abs().max() <= bound
    dt = nn.functional.softplus(Mamba(64, dt_init_floor=0.05).dt_proj.bias)
    assert dt.min().item() == pytest.approx(0.05, rel=1e-4)


def test_reset_is_reproducible_and_complete():
    torch.manual_seed(0)
    mixer = Mamba(16)
    torch.manual_seed(1)
    mixer.reset_parameters()
    unmaterialised = Mamba(16, device="meta")
    assert all(parameter.is_meta for parameter in unmaterialised.parameters())
    materialised = unmaterialised.to_empty(device="cpu")
    for parameter in materialised.parameters():
        parameter.data.fill_(math.nan)
    torch.manual_seed(1)
    materialised.reset_parameters()
    for (name, parameter), other in zip(mixer.named_parameters(), materialised.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert getattr(materialised.A_log, "_no_weight_decay", False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(dtype):
    mixer = Mamba(16, dtype=dtype)
    assert {parameter.dtype for parameter in mixer.parameters()} == {dtype}
    assert mixer(torch.randn(2, 3, 3, 16, dtype=dtype)).dtype == dtype


def test_meta_device():
    mixer = Mamba(16, device="meta")
    assert mixer(torch.empty(2, 3, 5, 16, device="meta")).shape == (2, 3, 5, 16)


def test_channels_first_memory():
    mixer = Mamba(16)
    x = torch.randn(2, 16, 3, 5).permute(0, 2, 3, 1)
    torch.testing.assert_close(mixer(x), mixer(x.contiguous()))


def test_autocast_training():
    mixer = Mamba(16)
    x = torch.randn(4, 3, 5, 16, requires_grad=True)
    true_y = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    assert (y - true_y).abs().max() < 0.03 * true_y.abs().max()
    y.float().square().mean().backward()
    for parameter in mixer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:The TorchScript type system:UserWarning")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_transforms(bidirectional):
    mixer = Mamba(16, bidirectional=bidirectional)
    traced = torch.fx.symbolic_trace(mixer)
    transformed = {
        "script": torch.jit.script(mixer),
        "fx": traced,
        "fx then script": torch.jit.script(traced),
        "compile": torch.compile(mixer, fullgraph=True, backend="aot_eager"),
    }
    x = torch.randn(3, 2, 5, 16, requires_grad=True)
    true_y = mixer(x)
    (true_grad,) = torch.autograd.grad(true_y.square().sum(), x)
    for name, function in transformed.items():
        y = function(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(y, true_y, msg=name)
        torch.testing.assert_close(grad, true_grad, msg=name)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"d_conv": -1}, "d_conv must be at least 1, got -1"),
        ({"expand": 0.1}, "expand must be at least 1 / d_model = 0.125, got 0.1"),
        ({"dt_rank": 0}, "dt_rank must be 'auto' or at least 1, got 0"),
        ({"dt_rank": "full"}, "dt_rank must be 'auto' or at least 1, got 'full'"),
        ({"dt_min": 0.0}, "0 < dt_min <= dt_max, got 0.0 and 0.1"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max, got 0.2 and 0.1"),
        ({"dt_init_floor": 0.0}, "dt_init_floor must be positive, got 0.0"),
    ],
)
def test_bad_arguments(argument, message):
    with pytest.raises(ValueError, match=message):
        Mamba(**{"d_model": 8, **argument})
