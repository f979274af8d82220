"""The assistant rule: the target is the student trained before, and the largest student comes first."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from timm_mamba_pkd.distillation.rules import Assistant, Batch, Residual


@pytest.mark.parametrize("stage", [1, 2, 4])
@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 4.0), (2.0, 1.0)])
def test_the_target_is_the_student_trained_before(stage, weight, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7)
    earlier = torch.randn(stage - 1, 5, 7)
    assistant = teacher if stage == 1 else earlier[stage - 2]
    batch = Batch(student, teacher, earlier, torch.zeros(5, dtype=torch.long), torch.arange(5), stage)
    found = Assistant(weight=weight, temperature=temperature).loss(batch)
    p, q = (Categorical(logits=logits / temperature) for logits in (assistant, student))
    torch.testing.assert_close(found, weight * temperature**2 * kl_divergence(p, q).mean())


def test_first_stage_is_that_of_the_residual_rule():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7)
    batch = Batch(student, teacher, torch.zeros(0, 5, 7), torch.zeros(5, dtype=torch.long), torch.arange(5), 1)
    torch.testing.assert_close(Assistant().loss(batch), Residual().loss(batch))


@pytest.mark.parametrize(("count", "order"), [(1, [0]), (2, [1, 0]), (7, [6, 5, 4, 3, 2, 1, 0])])
def test_the_last_student_is_trained_first(count, order):
    assert Assistant().order(count) == order


@pytest.mark.parametrize("kwargs", [{"weight": 0}, {"weight": math.nan}, {"temperature": 0}, {"temperature": -1}])
def test_arguments_out_of_range(kwargs):
    with pytest.raises(ValueError, match=f"assistant: {next(iter(kwargs))} must be positive, got"):
        Assistant(**kwargs)
