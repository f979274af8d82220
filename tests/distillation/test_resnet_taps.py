"""A student under a ResNet's module names: the shapes are torchvision's, the logits and the weights the student's."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from timm_mamba_pkd.distillation import ResNetTaps, build_model
from timm_mamba_pkd.models import count_macs, save_checkpoint
from timm_mamba_pkd.report import count_params

LAYERS = ("layer1", "layer2", "layer3", "layer4", "avgpool")


def taps(model_name: str = "mamba_pkd_s1", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    config = {"key": "mamba_pkd_resnet_taps", "kwargs": {"model_name": model_name, "num_classes": 5, **kwargs}}
    return build_model(config)


def seen(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What hooks of a config see: outputs of the layers, input and output of fc."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: found.update({name: out}))
        for name in LAYERS
    ]
    handles.append(
        model.get_submodule("fc").register_forward_hook(lambda _, args, out: found.update({"in": args, "out": out}))
    )
    model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (37, 50), (8, 8)])
@pytest.mark.parametrize("name", ["mamba_pkd_s1", "mamba_pkd_s7", "resnet10t", "test_convnext"])
def test_shapes_are_resnets(name, size):
    x = torch.randn(2, 3, *size)
    if name == "test_convnext" and size == (8, 8):
        return  # its own stem halves the grid further
    theirs = seen(torchvision.models.resnet18(num_classes=5).eval(), x)
    ours = seen(taps(name).train(), x)
    assert {layer: ours[layer].shape for layer in LAYERS} == {layer: theirs[layer].shape for layer in LAYERS}
    assert [a.shape for a in ours["in"]] == [a.shape for a in theirs["in"]] == [(2, 512)]
    assert ours["out"].shape == theirs["out"].shape


def test_imagenet_size_and_other_resnets():
    x = torch.randn(1, 3, 224, 224)
    found = seen(taps(channels=[256, 512, 1024, 2048]).train(), x)
    sides = {"layer1": 56, "layer2": 28, "layer3": 14, "layer4": 7, "avgpool": 1}
    widths = (256, 512, 1024, 2048, 2048)
    assert {n: tuple(found[n].shape) for n in LAYERS} == {
        name: (1, width, side, side) for (name, side), width in zip(sides.items(), widths, strict=True)
    }
    teacher: Any = build_model(
        {"key": "mamba_pkd_timm_model", "kwargs": {"model_name": "resnet18", "small_stem": True}}
    )
    x = torch.randn(2, 3, 20, 20)
    ours, theirs = seen(taps(reductions=[1, 2, 4, 8]).train(), x), {}
    for name in LAYERS[:4]:
        teacher.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: theirs.update({name: out}))
    teacher.eval()(x)
    assert {n: ours[n].shape for n in LAYERS[:4]} == {n: theirs[n].shape for n in LAYERS[:4]}


def test_each_layer_looks_at_the_nearest_stage():
    assert taps("mamba_pkd_s1").sources == [1, 2, 2, 2]  # stages at 1/2, 1/4, 1/8
    assert taps("mamba_pkd_s1", reductions=[1, 2, 4, 8]).sources == [0, 0, 1, 2]
    assert taps("resnet10t").sources == [1, 2, 3, 4]
    model = taps("mamba_pkd_s1").train()
    x = torch.randn(2, 3, 32, 32)
    features = {}
    model.student.stages[1].register_forward_hook(lambda _, args, out: features.update({"1": out}))
    layer1 = seen(model, x)["layer1"]
    torch.testing.assert_close(layer1, model.layer1.proj(features["1"]))  # the grids agree


@pytest.mark.parametrize("name", ["mamba_pkd_s2", "resnet10t", "test_vit", "test_efficientnet"])
def test_logits_are_the_students(name):
    model = taps(name)
    x = torch.randn(2, 3, 160, 160) if name == "test_vit" else torch.randn(2, 3, 32, 32)
    bare = copy.deepcopy(model.student)
    model.train()
    bare.train()
    assert torch.equal(model(x), bare(x))
    for a, b in zip(model.student.buffers(), bare.buffers(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(seen(model, x)["out"], bare(x))
    model.eval()
    bare.eval()
    assert torch.equal(model(x), bare(x))


def test_taps_do_not_run_in_eval_mode():
    model = taps().eval()
    assert seen(model, torch.randn(2, 3, 32, 32)) == {}
    assert count_macs(model, (3, 32, 32)) == count_macs(model.student, (3, 32, 32))
    assert count_params(model) == count_params(model.student) < sum(p.numel() for p in model.parameters())


def test_taps_learn_with_the_student():
    model = taps().train()
    assert {id(p) for p in model.layer4.parameters()} <= {id(p) for p in model.parameters()}
    seen(model, torch.randn(4, 3, 32, 32))["layer4"].square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.layer4.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.student.stem.conv.parameters())


def test_weights_are_the_bare_students(tmp_path):
    model = taps()
    assert model.state_dict().keys() == model.student.state_dict().keys()
    save_checkpoint(model, tmp_path / "trained.pt")
    student = timm.create_model("mamba_pkd_s1", num_classes=5, checkpoint_path=str(tmp_path / "trained.pt")).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(student(x), model.eval()(x))
    other = taps()
    nn.init.zeros_(other.student.head.fc.weight)
    assert not other.load_state_dict(model.state_dict()).missing_keys
    assert torch.equal(other.eval()(x), model(x))


def test_errors():
    with pytest.raises(ValueError, match=r"unknown timm model 'mamba_pkd_s9'; known: .*mamba_pkd_s7"):
        taps("mamba_pkd_s9")
    with pytest.raises(ValueError, match="MambaPKDEnsemble has no feature stages"):
        taps("mamba_pkd_ensemble", students=["mamba_pkd_s1"])
    with pytest.raises(ValueError, match="Linear has no feature stages"):
        ResNetTaps(nn.Linear(2, 2))
    for name, value in (("channels", [64, 128]), ("channels", [64, 128, 256, 0]), ("reductions", [4, 8, 16, 32.0])):
        with pytest.raises(ValueError, match=f"{name} must be four positive integers"):
            taps("mamba_pkd_s1", **{name: value})
