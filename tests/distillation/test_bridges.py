"""Bridges from torchdistill's registries to timm."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchdistill.models.registry import get_model
from torchdistill.optim.registry import get_optimizer

from timm_mamba_pkd import MambaPKDEnsemble
from timm_mamba_pkd.distillation import build_model, unknown_name


def timm_model(**kwargs: Any) -> Any:
    return get_model("mamba_pkd_timm_model", **kwargs)


def test_timm_model_is_timms():
    torch.manual_seed(0)
    ours = timm_model(model_name="test_resnet", in_chans=1, num_classes=5)
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet", in_chans=1, num_classes=5)
    assert type(ours) is type(theirs)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["resnet10t", "resnet18"])
def test_small_stem_keeps_the_grid(name):
    if name == "resnet10t":  # its stem has three convolutions
        with pytest.raises(ValueError, match="small_stem needs a timm ResNet with a single stem convolution"):
            timm_model(model_name=name, small_stem=True)
        return
    model = timm_model(model_name=name, small_stem=True, in_chans=1, num_classes=3).eval()
    sizes = []
    model.layer1.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    model.layer4.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape)))
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 3)
    assert sizes == [(2, 64, 28, 28), (2, 512, 4, 4)]
    assert model.conv1.weight.shape == (64, 1, 3, 3) and model.conv1.bias is None


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "mamba_pkd_s1"])
def test_small_stem_is_for_resnets(name):
    with pytest.raises(ValueError, match=f"small_stem needs a timm ResNet.*{name}"):
        timm_model(model_name=name, small_stem=True)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"unknown timm model 'resnet81'; known: .*resnet18"):
        timm_model(model_name="resnet81")
    with pytest.raises(ValueError, match=r"unknown model 'mamba_pkd_timm_modle'; known: .*mamba_pkd_timm_model"):
        build_model({"key": "mamba_pkd_timm_modle"})
    assert unknown_name("rule", "x", ["b", "a"]) == "unknown rule 'x'; known: a, b"
    assert unknown_name("model", "zzz", map(str, range(100))) == "unknown model 'zzz'"


def test_build_model_takes_torchvision_and_ours():
    assert type(build_model({"key": "resnet18", "kwargs": {"num_classes": 3}})).__module__.startswith("torchvision")
    assert isinstance(
        build_model({"key": "mamba_pkd_ensemble", "kwargs": {"students": ["mamba_pkd_s1"]}}), MambaPKDEnsemble
    )
    with pytest.raises(ValueError, match=r"model resnet18 does not take these kwargs: .*'colour'"):
        build_model({"key": "resnet18", "kwargs": {"colour": 1}})
    with pytest.raises(ValueError, match="unknown student 'mamba_pkd_s9'"):
        build_model({"key": "mamba_pkd_ensemble", "kwargs": {"students": ["mamba_pkd_s9"]}})


def optimizer_of(model: nn.Module, key: str = "mamba_pkd_adamw", **kwargs: Any) -> torch.optim.Optimizer:
    return get_optimizer(nn.ModuleList([model]), key, **kwargs)


@pytest.mark.parametrize("key", ["mamba_pkd_adamw", "mamba_pkd_muon"])
def test_matrices_only_decay(key):
    model = MambaPKDEnsemble(["mamba_pkd_s1", "mamba_pkd_s2"], num_classes=3, in_chans=1, img_size=8)
    model.students[1].requires_grad_(False)
    optimizer = optimizer_of(model, key, lr=0.002, weight_decay=0.1, betas=(0.8, 0.9))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(name for name in names.values() if name.startswith("students.0."))  # each once
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    assert {(group["lr"], group["betas"]) for group in optimizer.param_groups} == {(0.002, (0.8, 0.9))}
    # timm's own rule is the truth.
    spared = model.no_weight_decay()
    expected = {n for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1 and n not in spared}
    assert decayed == expected
    ends = {name.rsplit(".", 1)[-1] for name in held}
    assert {"A_log", "D", "weight", "bias"} <= ends
    assert not any(name.endswith(("A_log", ".D", "bias")) for name in decayed)


def test_adamw_is_torchs():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    weight, bias = (p.detach().clone().requires_grad_() for p in model.parameters())
    ours = optimizer_of(model, lr=0.1, weight_decay=0.5)
    theirs = [torch.optim.AdamW([weight], 0.1, weight_decay=0.5), torch.optim.AdamW([bias], 0.1, weight_decay=0.0)]
    for _ in range(3):
        x = torch.randn(4, 3)
        for optimizer, loss in ((ours, model(x)), (None, nn.functional.linear(x, weight, bias))):
            loss.square().sum().backward()
            for each in [optimizer] if optimizer else theirs:
                each.step()
                each.zero_grad()
    torch.testing.assert_close(list(model.parameters()), [weight, bias])


@pytest.mark.parametrize("key", ["mamba_pkd_adamw", "mamba_pkd_muon"])
def test_model_without_matrices(key):
    (group,) = optimizer_of(nn.LayerNorm(3), key, lr=0.1).param_groups
    assert group["weight_decay"] == 0.0 and len(group["params"]) == 2


@pytest.mark.parametrize("kwargs", [{}, {"foreach": True}, {"differentiable": True}, {"fused": False}])
def test_adamw_is_fused_unless_told_otherwise(kwargs):
    optimizer = get_optimizer(nn.ModuleList([nn.Linear(2, 2)]), "mamba_pkd_adamw", **kwargs)
    assert bool(optimizer.defaults["fused"]) is (not kwargs)


def test_muon_orthogonalizes_matrices_and_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    model = MambaPKDEnsemble(["mamba_pkd_s2"], num_classes=5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_of(model, "mamba_pkd_muon", lr=0.01, weight_decay=0.0, fallback_lr_scale=3.0)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    orthogonal = 0
    for name, p in model.named_parameters():
        assert p.grad is not None
        step, grad = (p - before[name]).double(), p.grad.double()
        if (p.ndim == 4 and p.shape[1] > 1) or (p.ndim == 2 and "A_log" not in name and min(p.shape) >= 4):
            step, grad = step.flatten(1), grad.flatten(1)
            u, s, v = torch.linalg.svd(grad, full_matrices=False)
            kept = s > 0.02 * s[0]  # which five iterations bring near one
            along = (u.T @ step @ v.T).diagonal()[kept] / (-0.01 * 0.2 * max(grad.shape) ** 0.5)
            assert along.min() > 0.5 and along.max() < 1.5, name
            orthogonal += 1
        elif "A_log" in name or p.ndim == 1 or p.shape[1] == 1:
            large = grad.abs() > 1e-4
            torch.testing.assert_close(step[large], -0.03 * grad.sign()[large], rtol=1e-2, atol=0)
    assert orthogonal > 10


def test_muon_resumes_exactly():
    results = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = MambaPKDEnsemble(["mamba_pkd_s1"], num_classes=5)
        optimizer = optimizer_of(model, "mamba_pkd_muon", nesterov=True)
        for i in range(3):
            if interrupted and i == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = optimizer_of(model, "mamba_pkd_muon", nesterov=True)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            model(torch.randn(4, 3, 32, 32)).square().sum().backward()
            optimizer.step()
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
