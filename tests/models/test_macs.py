import threading
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_mamba_pkd.models import count_macs
from timm_mamba_pkd.report import count_params, measure_latency


def resnet18_for_32_pixels() -> nn.Module:
    model = timm.create_model("resnet18", num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class LooksAtValues(nn.Module):
    """Fails on the meta device, as an ensemble that reads its number of active students from a buffer does."""

    def __init__(self, body: nn.Module, times: int = 1):
        super().__init__()
        self.body = body
        self.times: Tensor
        self.register_buffer("times", torch.tensor(times))

    def forward(self, x: Tensor) -> Tensor:
        return sum((self.body(x) for _ in range(int(self.times))), torch.zeros(()))


class KeepsItsOutput(nn.Module):
    """Counts its forwards in a buffer, and has tensors of an autograd graph, which deepcopy refuses."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.forwards: Tensor
        self.register_buffer("forwards", torch.zeros(()))
        self.kept: list[Tensor] = []
        self.last = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        self.last = self.linear(x)
        self.kept.append(self.last)
        return self.last


class Records:
    """A forward hook that holds what deepcopy refuses."""

    def __init__(self):
        self.calls = 0
        self.lock = threading.Lock()

    def __call__(self, *args) -> None:
        self.calls += 1


@pytest.mark.parametrize(
    ("model", "input_size", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 12), 10 * 12 * 8 * 3 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8), (8, 10, 12), 5 * 6 * 8 * 9),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), (3, 4, 4), 48 * 10),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), (3, 4, 4), 0),
    ],
    ids=["conv", "depthwise", "linear", "elementwise"],
)
def test_layers_match_their_formulas(model, input_size, macs):
    assert count_macs(model, input_size) == macs
    assert count_macs(LooksAtValues(model), input_size) == macs


def test_resnets_match_known_numbers():
    resnet18 = timm.create_model("resnet18")
    assert count_macs(resnet18, (3, 224, 224)) == pytest.approx(1.814e9, rel=1e-3)
    assert count_params(resnet18) == 11_689_512
    assert count_macs(resnet18_for_32_pixels(), (3, 32, 32)) == pytest.approx(556e6, rel=2e-3)


@pytest.mark.parametrize(
    "attention",
    [
        timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=1),
        nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, batch_first=True)),
    ],
    ids=["timm", "torch"],
)
def test_attention_counts_the_same_on_every_device(attention):
    size = (3, 32, 32) if hasattr(attention, "blocks") else (8, 8, 8)
    macs = count_macs(attention, size)
    assert macs > 0
    assert count_macs(LooksAtValues(attention), size) == macs
    assert torch.backends.mha.get_fastpath_enabled()


def test_selective_scan_counts_its_formula():
    ops = pytest.importorskip("timm_mamba_pkd.ops")

    class Scan(nn.Module):
        def __init__(self):
            super().__init__()
            self.A = nn.Parameter(-torch.rand(6, 4))

        def forward(self, x: Tensor) -> Tensor:  # channels 6, states 4, length 5
            u = x.flatten(2)
            b = u[:, :4]
            return ops.selective_scan(u, u, self.A, b, b)

    macs = (9 * 5 * 6 * 4 + 2 * 5 * 6) // 2
    assert count_macs(Scan(), (6, 1, 5)) == macs
    assert count_macs(LooksAtValues(Scan()), (6, 1, 5)) == macs


def test_values_decide_what_is_counted():
    assert count_macs(LooksAtValues(nn.Linear(4, 4), times=3), (1, 1, 4)) == 3 * 16


def test_model_in_training_is_left_as_it_was():
    keeps = KeepsItsOutput()
    model = nn.Sequential(keeps, nn.Dropout(), nn.BatchNorm1d(4))
    model[1].eval()
    records = Records()
    keeps.register_forward_hook(records)
    model(torch.ones(2, 4)).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad for parameter in model.parameters()]
    kept, last, modes = list(keeps.kept), keeps.last, [module.training for module in model.modules()]

    body = nn.Sequential(nn.Flatten(), model)
    for whole in (body, LooksAtValues(body)):
        assert count_macs(whole, (1, 1, 4)) == 16
        measure_latency(whole, (1, 1, 4), "cpu", repeats=5)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.grad for parameter in model.parameters()] == gradients
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert keeps.kept == kept
    assert keeps.last is last
    assert records.calls == 1


def test_half_precision_model():
    assert count_macs(nn.Conv2d(3, 8, 1).bfloat16(), (3, 4, 4)) == 3 * 8 * 16


def test_counts_inside_another_counter():
    with FlopCounterMode(display=False):
        assert count_macs(nn.Conv2d(3, 8, 1), (3, 4, 4)) == 3 * 8 * 16


def test_model_that_fails_everywhere_is_named_with_both_reasons():
    with pytest.raises(ValueError, match=r"(?s)MACs of Conv2d.*\(1, 4, 8, 8\).*on meta: .*on cpu: "):
        count_macs(nn.Conv2d(3, 8, 1), (4, 8, 8))


@pytest.mark.parametrize("name", ["mamba_pkd_s1", "mamba_pkd_s3"])
def test_exportable_models_count_like_others(name):
    usual, exportable = (timm.create_model(name, exportable=flag) for flag in (False, True))
    assert count_macs(exportable, (3, 32, 32)) == count_macs(usual, (3, 32, 32))
    mixer: Any = exportable.get_submodule("stages.1.blocks.0.mixer")
    assert mixer.backend == "exportable"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_counts_the_same():
    model = resnet18_for_32_pixels()
    macs = count_macs(model, (3, 32, 32))
    assert count_macs(LooksAtValues(model.cuda()), (3, 32, 32)) == macs
