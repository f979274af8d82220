"""The students in timm's dialect: what timm's own tests (test_timm_suite.py) ask for, offline, and more."""

import copy
import fnmatch
import math
from typing import Any

import pytest
import timm
import torch
import torch.utils.checkpoint
from timm.models import group_parameters, save_for_hf
from torch import Tensor, nn

from timm_mamba_pkd.models import STUDENTS, MambaPKD, save_checkpoint, save_weights

SMALL, LARGE = "mamba_pkd_s1", "mamba_pkd_s7"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(name: str = SMALL, **kwargs) -> Any:
    model = timm.create_model(name, **{"num_classes": 10, **kwargs})
    assert isinstance(model, MambaPKD)
    return model


def backward(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def test_registry():
    assert set(timm.list_models(module="mamba_pkd")) == set(STUDENTS)
    assert set(STUDENTS) < set(timm.list_models("mamba_pkd*"))
    for name in STUDENTS:
        assert timm.model_entrypoint(name).__doc__
        assert timm.get_pretrained_cfg_value(name, "input_size") == (3, 32, 32)


@pytest.mark.parametrize("name", STUDENTS)
def test_default_cfg_is_the_models(name):
    model: Any = timm.create_model(name, device="meta")
    cfg, state = model.default_cfg, model.state_dict()
    assert model.num_classes == cfg["num_classes"] == 1000
    assert model.in_chans == cfg["input_size"][0]
    assert state[cfg["first_conv"] + ".weight"].shape[1] == 3
    assert state[cfg["classifier"] + ".weight"].shape == (1000, model.num_features)
    features = model.forward_features(torch.empty(2, *cfg["input_size"], device="meta"))
    assert features.shape == (2, model.num_features, *cfg["pool_size"])
    assert model(torch.empty(2, *cfg["min_input_size"], device="meta")).shape == (2, 1000)
    assert set(cfg["mean"]) != {0.0}


@pytest.mark.parametrize("name", [SMALL, LARGE])
@pytest.mark.parametrize(
    ("num_classes", "pool", "times"),
    [(0, "", 1), *((n, pool, times) for n in (0, 2, 1000) for pool, times in (("avg", 1), ("catavgmax", 2)))],
)
def test_head(name, num_classes, pool, times):
    """What the constructor makes, `reset_classifier` makes too."""
    x = torch.empty(2, 3, 32, 32, device="meta")
    reset = make(name, device="meta")
    reset.reset_classifier(num_classes, pool)
    for model in (make(name, num_classes=num_classes, global_pool=pool, device="meta"), reset):
        grid = () if pool else (4, 4)
        assert model.num_classes == num_classes
        assert model.head_hidden_size == times * model.num_features
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, 4, 4)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size, *grid)
        assert model(x).shape == (2, num_classes or model.head_hidden_size, *grid)
        assert isinstance(model.get_classifier(), nn.Linear if num_classes else nn.Identity)


def test_reset_keeps_device_dtype_mode_pooling_and_freezing():
    for mode in (True, False):
        model = make(global_pool="max", device="meta", dtype=torch.float64).train(mode).requires_grad_(False)
        model.reset_classifier(0)
        model.set_input_size(img_size=(64, 48))
        assert model.img_size == (64, 48)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model.reset_classifier(2)
        assert model.head.global_pool.pool_type == "max"
        assert model.head.fc.weight.is_meta
        assert model.head.fc.weight.dtype == torch.float64
        assert {module.training for module in model.modules()} == {mode}


def test_unknown_argument():
    with pytest.raises(TypeError, match="not_a_model_arg"):
        make(not_a_model_arg=1)


@pytest.mark.parametrize("name", STUDENTS)
def test_meta_device_and_dtype(name):
    model = make(name, device="meta", dtype=torch.float64)
    tensors = model.state_dict().values()
    assert all(tensor.is_meta for tensor in tensors)
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    assert model(torch.empty(2, 3, 32, 32, device="meta", dtype=torch.float64)).shape == (2, 10)
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in make(name).state_dict().values())


@pytest.mark.parametrize("name", STUDENTS)
def test_parameter_groups(name):
    model = make(name, device="meta")
    names = [key for key, _ in model.named_parameters()]
    for coarse, count in ((False, 2 + len(model.stages) - 1), (True, 4)):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert sorted(groups) == sorted(names)
        assert len(set(groups.values())) >= count
        # Layer decay follows the order of evaluation.
        order = [
            "stem.conv.weight",
            "stages.0.downsample.expand.conv.weight",
            "stages.1.downsample.pointwise.conv.weight",
        ]
        order += ["stages.1.blocks.0.mixer.D", "stages.2.blocks.0.mixer.D", "norm.weight", "head.fc.weight"]
        depths = [groups[key] for key in order]
        assert depths == sorted(depths)
        assert groups["stem.conv.weight"] < groups["stages.1.blocks.0.mixer.D"] < groups["stages.2.blocks.0.mixer.D"]
    for pattern in model.no_weight_decay():
        assert any(fnmatch.fnmatch(key, pattern) for key in names), pattern


@pytest.mark.parametrize("feature_cls", [None, "getter", "list", "dict", "hook", "fx"])
@pytest.mark.parametrize("size", [(16, 16), (33, 17), (8, 9)])
def test_features_only(feature_cls, size):
    model: Any = timm.create_model(SMALL, features_only=True, feature_cls=feature_cls).eval()
    whole = make().eval()
    whole.load_state_dict({**whole.state_dict(), **stripped(model.state_dict())})
    assert model.feature_info.reduction() == [2, 4, 8]
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = model(x)
        true = whole.forward_intermediates(x, intermediates_only=True)
    features = list(features.values()) if isinstance(features, dict) else features
    for feature, level, channels, reduction in zip(
        features, true, model.feature_info.channels(), [2, 4, 8], strict=True
    ):
        assert feature.shape == (2, channels, math.ceil(size[0] / reduction), math.ceil(size[1] / reduction))
        torch.testing.assert_close(feature, level)


def stripped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a features-only model in the names of the whole model."""
    prefixes = {"model.": "", "graph_module.": "", "stages_": "stages."}
    for old, new in prefixes.items():
        state = {(new + key.removeprefix(old) if key.startswith(old) else key): value for key, value in state.items()}
    return state


def test_some_features_only():
    model: Any = timm.create_model(SMALL, features_only=True, out_indices=(-2, 0))
    assert model.feature_info.channels() == [20, 12]
    assert not any("stages.2" in key or "head" in key for key, _ in model.named_parameters())
    assert {feature.shape[1] for feature in model(torch.randn(2, 3, 16, 16))} == {12, 20}


def test_forward_intermediates():
    model = make("mamba_pkd_s2").eval()
    x = torch.randn(1, 3, 10, 17)
    outputs = {}
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda module, args, output, i=i: outputs.update({i: output}))
    with torch.no_grad():
        true = model.forward_features(x)
        final, features = model.forward_intermediates(x)
        torch.testing.assert_close(final, true, rtol=0, atol=0)
        assert [feature.shape for feature in features] == [(1, 16, 5, 9), (1, 32, 3, 5), (1, 54, 2, 3)]
        for i, feature in enumerate(features):
            torch.testing.assert_close(feature, outputs[i], rtol=0, atol=0)
        _, normalised = model.forward_intermediates(x, norm=True)
        torch.testing.assert_close(normalised, [outputs[0], outputs[1], model.norm(true)], rtol=0, atol=0)
        (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
        torch.testing.assert_close(last, features[2], rtol=0, atol=0)
        for index in range(3):
            for norm in (False, True):
                outputs.clear()
                final, (feature,) = model.forward_intermediates(x, [index - 3], norm, True)
                assert sorted(outputs) == list(range(index + 1))
                expected = normalised[2] if norm and index == 2 else outputs[index]
                torch.testing.assert_close(feature, expected, rtol=0, atol=0)
                torch.testing.assert_close(final, outputs[index], rtol=0, atol=0)
    with pytest.raises(ValueError, match="output_fmt must be NCHW, got NLC"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(x, indices=[3])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_prune_intermediate_layers(index):
    model = make(drop_rate=0.5)
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        true, taps = model.eval()(x), model.forward_intermediates(x, intermediates_only=True)
        if index == 2:
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([2], prune_head=False) == [2]
            torch.testing.assert_close(pruned(x), true, rtol=0, atol=0)
    for prune_norm in (False, True):
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([index], prune_norm=prune_norm) == [index]
        assert pruned.num_classes == 0
        assert pruned.num_features == pruned.head_hidden_size == taps[index].shape[1]
        with torch.no_grad():
            final, (feature,) = pruned.forward_intermediates(x, [index])
            torch.testing.assert_close(feature, taps[index])
            torch.testing.assert_close(pruned.forward_features(x), final)
            torch.testing.assert_close(final, feature)
            torch.testing.assert_close(pruned(x), final if index < 2 or prune_norm else model.norm(final))
        (pruned.train()(x).square().mean()).backward()
        assert [key for key, parameter in pruned.named_parameters() if parameter.grad is None] == []
    pruned.reset_classifier(7, "avg")
    assert pruned(x).shape == (2, 7)


def test_grad_checkpointing():
    model = make()
    x = torch.randn(2, 3, 9, 9)
    true = model(x)
    true_gradients = backward(model, true.square().sum())
    model.set_grad_checkpointing()
    calls = []
    model.stages[2].blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
    y = model(x)
    assert len(calls) == 1
    torch.testing.assert_close(y, true)
    torch.testing.assert_close(backward(model, y.square().sum()), true_gradients)
    assert len(calls) == 2
    model.set_grad_checkpointing(False)
    backward(model, model(x).sum())
    assert len(calls) == 3


@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_bfloat16(name):
    model = make(name).eval()
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        true, y = model(x), copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - true).abs().max() < 0.05 * true.abs().max()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:The TorchScript type system:UserWarning")
def test_features_in_torchscript():
    model: Any = timm.create_model(SMALL, features_only=True).eval()
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("safe", [False, True])
def test_local_dir_round_trip(tmp_path, safe):
    model = make("mamba_pkd_s2", in_chans=1, img_size=28, global_pool="max", drop_path_rate=0.1).eval()
    model.reset_classifier(7)
    model.set_input_size((28, 20))
    save_for_hf(model, str(tmp_path), safe_serialization=safe)
    restored: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert restored.img_size == (28, 20)
    assert restored.in_chans == restored.default_cfg["input_size"][0] == 1
    torch.testing.assert_close(restored.state_dict(), model.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, 1, 28, 20)
    torch.testing.assert_close(restored(x), model(x), rtol=0, atol=0)
    adapted: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=3)
    torch.testing.assert_close(adapted.stages.state_dict(), model.stages.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(adapted.stem.conv.weight.sum(1, keepdim=True), model.stem.conv.weight)


@pytest.mark.parametrize(("index", "prune_norm"), [(0, False), (1, False), (2, False), (2, True)])
@pytest.mark.parametrize("num_classes", [0, 4])
def test_local_dir_round_trip_after_pruning(tmp_path, index, prune_norm, num_classes):
    model = make(in_chans=1, img_size=28).eval()
    model.prune_intermediate_layers([index], prune_norm=prune_norm)
    if num_classes:
        model.reset_classifier(num_classes, "avg")
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    restored: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(restored.state_dict(), model.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(restored(x), model(x), rtol=0, atol=0)
    assert (restored.num_classes, restored.num_features) == (num_classes, model.num_features)
    assert restored.prune_intermediate_layers([0]) == [0]


@pytest.mark.parametrize(("suffix", "save"), [("safetensors", save_weights), ("pt", save_checkpoint)])
def test_checkpoint_path(tmp_path, suffix, save):
    model = make()
    model(torch.randn(4, 3, 16, 16))  # moves the running statistics
    save(model, tmp_path / f"weights.{suffix}")
    restored = make(checkpoint_path=str(tmp_path / f"weights.{suffix}"))
    torch.testing.assert_close(restored.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_pretrained_weights_from_a_file(tmp_path, suffix):
    """What a release is: weights of ours named in a pretrained_cfg_overlay."""
    model = make()
    path = tmp_path / f"weights.{suffix}"
    (save_weights if suffix == "safetensors" else save_checkpoint)(model, path)
    overlay = {"file": str(path), "num_classes": 10}
    restored = make(pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(restored.state_dict(), model.state_dict(), rtol=0, atol=0)
    features: Any = timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    restored.load_state_dict({**make().state_dict(), **stripped(features.state_dict())})
    torch.testing.assert_close(restored.stages.state_dict(), model.stages.state_dict(), rtol=0, atol=0)
