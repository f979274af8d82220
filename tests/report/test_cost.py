from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_mamba_pkd.report import count_params, measure_latency, measure_peak_memory


def test_shared_parameters_count_once_and_frozen_ones_do():
    linear = nn.Linear(4, 4)
    assert count_params(nn.Sequential(linear, linear)) == 20
    assert count_params(linear.requires_grad_(False)) == 20


class Naps(nn.Module):
    """Takes the milliseconds given for each run, the last of them for all that follow, on a clock of its own."""

    now = 0.0
    runs = 0
    milliseconds = (100,)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        assert x.shape == (1, 3, 4, 4)
        Naps.now += self.milliseconds[min(Naps.runs, len(self.milliseconds) - 1)] / 1000
        Naps.runs += 1
        return x


@pytest.fixture
def naps(monkeypatch) -> Naps:
    monkeypatch.setattr(Naps, "now", 0.0)
    monkeypatch.setattr(Naps, "runs", 0)
    monkeypatch.setattr("timm_mamba_pkd.report.cost.time", SimpleNamespace(perf_counter=lambda: Naps.now))
    return Naps()


def test_latency_is_the_median_in_milliseconds_after_the_warm_up(naps):
    naps.milliseconds = (200, 200, 50, 10, 30, 10, 50)
    assert measure_latency(naps, (3, 4, 4), "cpu", repeats=5) == pytest.approx(30)
    assert naps.training


@pytest.mark.parametrize(("milliseconds", "runs"), [(1, 10 + 50), (100, 3 + 10), (2000, 2 + 5)])
def test_latency_takes_bounded_time(naps, milliseconds, runs):
    naps.milliseconds = (milliseconds,)
    assert measure_latency(naps, (3, 4, 4), "cpu") == pytest.approx(milliseconds)
    assert runs - 1 <= Naps.runs <= runs + 1  # sums of floats decide the last one


def test_latency_needs_five_runs():
    with pytest.raises(ValueError, match="at least 5"):
        measure_latency(nn.Identity(), (3, 4, 4), "cpu", repeats=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_latency_on_cuda_is_that_of_a_copy():
    model = timm.create_model("resnet18")
    assert measure_latency(model, (3, 32, 32), "cuda") > 0
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


class Adds(nn.Module):
    """Takes images of n bytes: n for the images, n for the sum, 2 n for the concatenation."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        z = torch.cat([y, y])
        del y
        return z.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peak_memory(dtype):
    images = torch.zeros(4, 1, 64, 64, dtype=dtype)
    assert measure_peak_memory(Adds(), images, "cpu") == pytest.approx(4 * images.nbytes, rel=0.01)
    weights = nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, 100, dtype=dtype))
    extra = 100 * (64 * 64 + 1 + 4) * images.element_size()  # weight, bias, output
    assert measure_peak_memory(weights, images, "cpu") == pytest.approx(images.nbytes + extra, rel=0.01)
