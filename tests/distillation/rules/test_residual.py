"""The residual rule against its formula."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from timm_mamba_pkd.distillation.rules import Batch, Independent, Residual


def value(rule: Residual, stage: int, student: Tensor, teacher: Tensor, earlier: Tensor | None = None) -> Tensor:
    """The loss in ``stage``, where the mean of the earlier students' logits is ``earlier``."""
    count = stage - 1
    if count and earlier is not None:
        apart = torch.linspace(-1, 1, count, dtype=earlier.dtype)[:, None, None] if count > 1 else 0.0
        each = (earlier + apart).expand(count, *earlier.shape)  # different students of that mean
    else:
        each = student.new_zeros(0, *student.shape)
    labels = torch.zeros(len(student), dtype=torch.long)
    return rule.loss(Batch(student, teacher, each, labels, torch.arange(len(student)), stage))


def test_by_hand():
    # k = 3, step 1/2: gain 1, target (2, 0) + 1 ((2, 0) - (0, 1)) = (4, -1); against a student that says nothing.
    p = 1 / (1 + math.exp(-5 / 2))
    expected = 0.25 * 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    rule = Residual(step=0.5, temperature=2.0, weight=0.25)
    found = value(rule, 3, torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_first_stage_is_plain_distillation(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = temperature**2 * kl_divergence(
        Categorical(logits=teacher / temperature), Categorical(logits=student / temperature)
    )
    found = value(Residual(weight=1.0, temperature=temperature), 1, student, teacher)
    torch.testing.assert_close(found, expected.mean())


@pytest.mark.parametrize("stage", [1, 2, 5])
@pytest.mark.parametrize("step", [0.0, 0.3, 1.0])
def test_zero_exactly_at_the_target(stage, step):
    torch.manual_seed(1)
    teacher, earlier = torch.randn(2, 6, 4, dtype=torch.float64)
    target, rule = teacher + step * (stage - 1) * (teacher - earlier), Residual(step=step)
    student = (target + torch.randn(6, 1, dtype=torch.float64)).requires_grad_()  # softmax ignores a constant per row
    at_target = value(rule, stage, student, teacher, earlier)
    at_target.backward()
    assert at_target.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-12, rtol=0)
    for row in range(6):
        off = target.clone()
        off[row, 0] += 0.1
        assert value(rule, stage, off, teacher, earlier) > 1e-6


def test_gradient_is_the_difference_of_the_softmaxes():
    torch.manual_seed(2)
    teacher, earlier, student = torch.randn(3, 6, 4, dtype=torch.float64)
    student.requires_grad_()
    value(Residual(weight=1.0, temperature=3.0), 2, student, teacher, earlier).backward()
    target = 2 * teacher - earlier
    torch.testing.assert_close(student.grad, 3.0 * ((student / 3).softmax(-1) - (target / 3).softmax(-1)).detach() / 6)


@pytest.mark.parametrize("stage", [1, 2, 3, 6])
def test_mean_of_the_students_is_the_teacher_when_the_last_outputs_its_target(stage):
    torch.manual_seed(3)
    teacher = torch.randn(6, 4, dtype=torch.float64)
    students = torch.randn(stage - 1, 6, 4, dtype=torch.float64)
    # The last student is found by descent on the loss alone, so this knows nothing of the formula for the target.
    last = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    rule, labels = Residual(weight=1.0), torch.zeros(6, dtype=torch.long)
    optimizer = torch.optim.LBFGS([last], max_iter=500, tolerance_grad=1e-14, tolerance_change=0)

    def closure() -> float:
        optimizer.zero_grad()
        found = rule.loss(Batch(last, teacher, students, labels, torch.arange(6), stage))
        found.backward()
        return found.item()

    optimizer.step(closure)
    mean = torch.cat([students, last.detach()[None]]).mean(0)
    torch.testing.assert_close(mean.log_softmax(-1), teacher.log_softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"weight": 0},
        {"weight": -1},
        {"weight": math.nan},
        {"temperature": 0},
        {"temperature": math.nan},
        {"step": -0.1},
        {"step": 1.1},
        {"step": math.nan},
    ],
)
def test_arguments_out_of_range(kwargs):
    with pytest.raises(ValueError, match=f"residual: {next(iter(kwargs))} must be"):
        Residual(**kwargs)


def test_independent_adds_nothing_and_sees_nothing():
    assert not Independent().adds_loss and not Independent().sees_earlier and not Independent().judges
    assert Independent().order(4) == [0, 1, 2, 3]
