"""The step after a loss: torchdistill's own, bit for bit, and float16's scaled gradients."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, StepLR
from torchdistill.core.interfaces.post_forward_proc import default_post_forward_process
from torchdistill.core.interfaces.registry import register_post_forward_proc_func

from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.step import Step, require_our_step

CPU = torch.device("cpu")


class Box:
    """What a step sees of torchdistill's box."""

    post_forward_process = default_post_forward_process
    accelerator = None

    def __init__(self, model: nn.Module, accumulate: int = 1, norm: float | None = None, scheduler: Any = None) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.stage_grad_count, self.grad_accum_step, self.max_grad_norm = 0, accumulate, norm
        self.lr_scheduler = None if scheduler is None else scheduler[0](self.optimizer, **scheduler[1])
        self.scheduling_step = None if scheduler is None else scheduler[2]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("norm", [None, 0.01])
@pytest.mark.parametrize(
    "scheduler",
    [
        None,
        (StepLR, {"step_size": 1, "gamma": 0.5}, 0),
        (StepLR, {"step_size": 1, "gamma": 0.5}, 2),
        (CosineAnnealingWarmRestarts, {"T_0": 2}, 3),
    ],
)
def test_it_is_torchdistills(accumulate, norm, scheduler):
    torch.manual_seed(0)
    models = [nn.Linear(4, 3)]
    models.append(copy.deepcopy(models[0]))
    boxes: list[Any] = [Box(model, accumulate, norm, scheduler) for model in models]
    step = Step(CPU, None)
    for _ in range(7):
        x = torch.randn(5, 4)
        boxes[0].post_forward_process(loss=models[0](x).square().mean())
        step(boxes[1], models[1](x).square().mean())
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(one, other)
        assert boxes[0].optimizer.param_groups[0]["lr"] == boxes[1].optimizer.param_groups[0]["lr"]
    assert boxes[0].stage_grad_count == boxes[1].stage_grad_count == 7


@pytest.mark.parametrize("norm", [None, 0.01])
def test_scaled_gradients(norm):
    """Clipping sees the true gradients; what overflows is passed over, with a smaller scale from then on."""
    models = [nn.Linear(4, 3)]
    models.append(copy.deepcopy(models[0]))
    plain, scaled = (Box(model, 2, norm) for model in models)
    one, other = Step(CPU, None), Step(CPU, torch.float16)
    x = torch.randn(5, 4)
    for _ in range(4):
        one(plain, models[0](x).square().mean())
        other(scaled, models[1](x).square().mean())
    torch.testing.assert_close(models[0].weight, models[1].weight)
    before = models[1].weight.clone()
    scale = other.scaler.get_scale()
    other(scaled, models[1](x).square().mean())
    other(scaled, models[1](x).square().mean() * torch.finfo(torch.float32).max)
    assert torch.equal(models[1].weight, before) and other.scaler.get_scale() == scale / 2
    again = Step(CPU, torch.float16)
    again.scaler.load_state_dict(other.scaler.state_dict())
    assert again.scaler.get_scale() == scale / 2


def test_gradients_that_always_overflow():
    model = nn.Linear(4, 3)
    box, step = Box(model), Step(CPU, torch.float16)

    def train() -> None:
        for _ in range(40):
            step(box, (model(torch.ones(1, 4)) * torch.inf).sum())

    with pytest.raises(FloatingPointError, match=r"loss scale below 0.0001: lower the lr"):
        train()


def test_another_process(plain, run, errors):
    @register_post_forward_proc_func(key="own_step")
    def own_step(self: Any, loss: torch.Tensor, **kwargs: Any) -> None:
        default_post_forward_process(self, loss)

    _, folder = run(plain, output="default")
    plain["train"]["post_forward_process"] = "own_step"
    code, own = run(plain, output="own")
    assert code == 0
    results = [(path / "weights" / "model.safetensors").read_bytes() for path in (folder, own)]
    assert results[0] == results[1]
    assert run(plain, "--amp", "--amp-dtype", "float16")[0] == 2
    (line,) = errors()
    assert line.startswith("line ") and "post_forward_process takes the optimizer's step itself" in line


def test_only_float16_needs_it():
    class Own(Box):
        post_forward_process = staticmethod(lambda loss: None)

    require_our_step(Own(nn.Linear(1, 1)), torch.bfloat16, "stage1")
    with pytest.raises(ConfigError, match="--amp-dtype bfloat16"):
        require_our_step(Own(nn.Linear(1, 1)), torch.float16, "stage1")
