"""What a student computes, costs and refuses. Its timm dialect is in test_timm_conventions.py."""

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

from timm_mamba_pkd.layers import InvertedResidual, Mamba, MambaBlock
from timm_mamba_pkd.models import STUDENTS, MambaPKD, count_macs

BUDGETS = dict(zip(STUDENTS, (1.0e6, 2.5e6, 5.5e6, 10.9e6, 20e6, 28e6, 40.8e6), strict=True))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(name: str = "mamba_pkd_s1", **kwargs) -> Any:
    model = timm.create_model(name, **{"num_classes": 10, **kwargs})
    assert isinstance(model, MambaPKD)
    return model


def inverted_residual(dim: int) -> int:
    return 2 * dim**2 + 9 * 2 * dim + 2 * dim**2


def macs_by_hand(name: str, num_classes: int, size: int = 32) -> tuple[float, float]:
    """Multiply-accumulates on a 3 x size x size image, and the scan's share of them: half its FLOPs."""
    cfg = STUDENTS[name]
    side, hidden, scan = math.ceil(size / 2), 2 * cfg.stem, 0.0
    total = (9 * 3 * cfg.stem + cfg.stem * hidden) * size**2 + (9 * hidden + hidden * cfg.dims[0]) * side**2
    total += cfg.depths[0] * side**2 * inverted_residual(cfg.dims[0])
    for previous, dim, depth in zip(cfg.dims, cfg.dims[1:], cfg.depths[1:], strict=False):
        side = math.ceil(side / 2)
        length, inner, rank = side**2, int(cfg.expand * dim), math.ceil(dim / 16)
        total += length * (9 * previous + previous * dim)
        both_scans = 9 * length * inner * cfg.d_state + 2 * length * inner
        mixer = length * (dim * 2 * inner + 4 * inner + inner * (rank + 2 * cfg.d_state + rank) + inner * dim)
        total += depth * (mixer + both_scans + length * inverted_residual(dim))
        scan += depth * both_scans
    return total + cfg.dims[-1] * num_classes, scan


@pytest.mark.parametrize("num_classes", [10, 1000])
@pytest.mark.parametrize("name", STUDENTS)
def test_cost_is_within_the_budget(name, num_classes):
    macs = count_macs(make(name, num_classes=num_classes, device="meta"), (3, 32, 32))
    by_hand, scan = macs_by_hand(name, num_classes)
    assert macs == by_hand
    assert 0.85 <= macs / BUDGETS[name] <= 1
    assert macs + scan <= BUDGETS[name], "with each of the scan's FLOPs counted as a multiply-accumulate"


@pytest.mark.parametrize("name", STUDENTS)
def test_most_blocks_have_a_mamba_mixer(name):
    model = make(name, device="meta")
    blocks = [block for stage in model.stages for block in stage.blocks]
    mamba = [block for block in blocks if isinstance(block, MambaBlock) and isinstance(block.mixer, Mamba)]
    assert len(mamba) > len(blocks) / 2
    assert all(isinstance(block, InvertedResidual) for block in blocks if block not in mamba)


@pytest.mark.parametrize("name", STUDENTS)
def test_every_parameter_gets_a_gradient(name):
    model = make(name)
    loss = nn.functional.cross_entropy(model(torch.randn(2, 3, 9, 9)), torch.arange(2))
    assert loss.item() == pytest.approx(math.log(10), abs=0.3)
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


def test_learns_eight_images():
    model = make()
    x, labels = torch.randn(8, 3, 9, 9), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    assert (model(x).argmax(1) == labels).sum() >= 7


@pytest.mark.parametrize(
    ("size", "in_chans"), [((8, 8), 3), ((9, 9), 1), ((28, 28), 1), ((33, 17), 5), ((8, 64), 3), ((224, 224), 3)]
)
def test_any_size_and_channels(size, in_chans):
    model = make(img_size=size, in_chans=in_chans).eval()
    other = make(in_chans=in_chans).eval()
    other.load_state_dict(model.state_dict())
    assert model.img_size == size
    x = torch.randn(1, in_chans, *size)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (1, 32, math.ceil(size[0] / 8), math.ceil(size[1] / 8))
        assert features.std() > 0.1
        logits = model.norm(features).mean((2, 3)) @ model.head.fc.weight.T + model.head.fc.bias
        torch.testing.assert_close(model(x), logits)
        torch.testing.assert_close(other(x), logits)  # made for another size


@pytest.mark.parametrize("name", ["mamba_pkd_s1", "mamba_pkd_s7"])
def test_one_image_gives_what_it_gives_in_a_batch(name):
    model = make(name).eval()
    x = torch.randn(2, 3, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), model(x))


def test_logits_depend_on_every_pixel():
    model = make().eval().double()
    x = torch.randn(1, 3, 9, 12, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x)[0, 3], x)
    assert grad.all()


def test_initialisation_of_kernels():
    for key, parameter in make("mamba_pkd_s7", num_classes=1000).named_parameters():
        if key.endswith("depthwise.conv.weight"):
            assert parameter.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.2), key
        elif key in ("stem.conv.weight", "stages.1.downsample.pointwise.conv.weight"):
            fan_out = parameter.shape[0] * parameter[0, 0].numel()
            assert parameter.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), key
        elif key == "head.fc.weight":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), key


def test_init_weights_is_complete_and_reproducible():
    model = make()
    torch.manual_seed(1)
    model.init_weights()
    materialised = make(device="meta").to_empty(device="cpu")
    for tensor in materialised.state_dict().values():
        tensor.fill_(math.nan if tensor.is_floating_point() else 99)
    torch.manual_seed(1)
    materialised.init_weights()
    torch.testing.assert_close(materialised.state_dict(), model.state_dict(), rtol=0, atol=0)
    model.init_weights()
    assert not torch.equal(model.stem.conv.weight, materialised.stem.conv.weight)


def test_only_the_state_space_is_kept_from_decay():
    model = make("mamba_pkd_s2")
    expected = {key for key, _ in model.named_parameters() if key.endswith((".A_log", ".D", ".dt_proj.bias"))}
    assert len(expected) == 3 * 3
    assert model.no_weight_decay() == expected
    assert copy.deepcopy(model).no_weight_decay() == expected
    assert make("mamba_pkd_s2", device="meta").to_empty(device="cpu").no_weight_decay() == expected


def test_drop_path_and_dropout():
    plain, x = make(), torch.randn(4, 3, 9, 9)
    dropping = make(drop_path_rate=0.5)
    dropping.load_state_dict(plain.state_dict())
    torch.testing.assert_close(plain(x), plain(x))
    assert not torch.allclose(dropping(x), dropping(x))
    dropping.load_state_dict(plain.state_dict())  # the running statistics have moved
    torch.testing.assert_close(dropping.eval()(x), plain.eval()(x))

    model = make(drop_rate=0.25)
    features = torch.randn(500, 32, 2, 2)
    dropped = model.forward_head(features, pre_logits=True)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert (model.eval().forward_head(features, pre_logits=True) != 0).all()


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 1)])
def test_small_images_are_refused(size):
    model = make().eval()
    side = "high" if size[0] < 8 else "wide"
    for function in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(AssertionError, match=f"images must be at least 8 pixels {side}"):
            function(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("name", ["mamba_pkd_s1", "mamba_pkd_ensemble"])
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"img_size": 7}, "img_size must be at least 8 .*, got 7"),
        ({"img_size": (32, 0)}, r"img_size must be at least 8 .*, got \(32, 0\)"),
        ({"img_size": (3, 32, 32)}, r"img_size must be a whole number or \(height, width\), got \(3, 32, 32\)"),
        ({"img_size": 32.0}, r"img_size must be a whole number or \(height, width\), got 32.0"),
        ({"img_size": "32"}, r"img_size must be a whole number or \(height, width\), got '32'"),
        ({"in_chans": 0}, "in_chans must be a whole number from 1 up, got 0"),
        ({"in_chans": 1.5}, "in_chans must be a whole number from 1 up, got 1.5"),
        ({"num_classes": -1}, r"num_classes must be a whole number from [01].* up, got -1"),
        ({"num_classes": "10"}, r"num_classes must be a whole number from [01].* up, got '10'"),
        ({"num_classes": True}, r"num_classes must be a whole number from [01].* up, got True"),
        ({"num_classes": 2.5}, r"num_classes must be a whole number from [01].* up, got 2.5"),
        ({"in_chans": "3"}, "in_chans must be a whole number from 1 up, got '3'"),
        ({"img_size": True}, r"img_size must be a whole number or \(height, width\), got True"),
        ({"drop_rate": 1.0}, "drop_rate must be a number from 0 to below 1, got 1.0"),
        ({"drop_rate": 1.5}, "drop_rate must be a number from 0 to below 1, got 1.5"),
        ({"drop_rate": "a"}, "drop_rate must be a number from 0 to below 1, got 'a'"),
        ({"drop_rate": True}, "drop_rate must be a number from 0 to below 1, got True"),
        ({"drop_path_rate": -0.1}, "drop_path_rate must be a number from 0 to below 1, got -0.1"),
        ({"drop_path_rate": math.nan}, "drop_path_rate must be a number from 0 to below 1, got nan"),
        ({"global_pool": ""}, "global_pool must be .*, got ''"),
        ({"global_pool": "mean"}, r"global_pool must be one of avg, max, .*, got 'mean'"),
        ({"dtype": torch.int64}, "dtype must be torch.float32, .*, got torch.int64"),
        ({"dtype": torch.complex64}, "dtype must be torch.float32, .*, got torch.complex64"),
        ({"dtype": "float32"}, "dtype must be torch.float32, .*, got 'float32'"),
    ],
)
def test_bad_arguments(name, argument, message):
    # timm itself refuses an img_size that is not positive, after the model has.
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **{"num_classes": 10, **argument})


@pytest.mark.parametrize("num_stages", [0, 4, 2.0, True])
def test_bad_number_of_stages(num_stages):
    with pytest.raises(ValueError, match=f"num_stages must be a whole number from 1 to 3, got {num_stages}"):
        make(num_stages=num_stages)


def test_pooling_of_a_new_classifier_is_checked():
    model = make()
    for num_classes, pool in ((0, "mean"), (3, "")):
        with pytest.raises(ValueError, match=f"global_pool must be .*, and '' where num_classes is 0, got '{pool}'"):
            model.reset_classifier(num_classes, pool)
    model.reset_classifier(0, "")
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 32, 2, 2)


def test_bad_class_count_of_a_new_classifier():
    models: list[Any] = [make(), timm.create_model("mamba_pkd_ensemble", students=["mamba_pkd_s1"])]
    for model in models:
        with pytest.raises(ValueError, match=r"num_classes must be a whole number from .* up, got -3"):
            model.reset_classifier(-3)


def test_bad_input_size():
    model = make()
    with pytest.raises(ValueError, match="img_size must be at least 8"):
        model.set_input_size(7)
    assert model.img_size == (32, 32)
