"""What a progressive rule must do, as checks that run on any rule: ours in the tests, a third party's in its own.

For instance, in a third party's pytest file::

    from timm_mamba_pkd.distillation.rules import contract

    @pytest.mark.parametrize("check", contract.CHECKS)
    def test_my_rule(check):
        check("my_package.my_rule.MyRule")  # or check({"key": ..., "kwargs": {...}})

A check raises an AssertionError that says what is wrong.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_mamba_pkd.distillation.rules import Batch, Rule, Verdict, build_rule
from timm_mamba_pkd.models.combination import COMBINATIONS

SAMPLES, CLASSES, STAGES = 12, 3, 3


def has_sound_attributes(config: str | dict[str, Any]) -> None:
    """A rule is made afresh on every call, and its order names every student once."""
    rule, other = build_rule(config), build_rule(config)
    assert rule is not other, "two schedules would share a rule"
    for n in (1, 2, 7):
        assert sorted(rule.order(n)) == list(range(n)), f"order({n}) must name each of {n} students once"
    assert isinstance(rule.max_retries, int) and rule.max_retries >= 0, "max_retries must be an integer of at least 0"
    unknown = set(rule.combinations) - set(COMBINATIONS)
    assert rule.combinations and not unknown, f"combinations must be some of {', '.join(COMBINATIONS)}"
    assert rule.judges or rule.max_retries == 0, "only a rule that judges can ask for retries"
    assert not list(rule.parameters()), "what a rule keeps belongs into buffers: the optimizer never sees a rule"


def gives_a_finite_loss_with_a_gradient(config: str | dict[str, Any]) -> None:
    """In every stage the loss is a finite scalar with a gradient for the student, and for nothing else."""
    rule = _started(config)
    if not rule.adds_loss:
        return
    for stage in range(1, STAGES + 1):
        for soft in (False, True):
            batch = _batch(stage, soft)
            loss = rule.loss(batch)
            assert loss.ndim == 0, f"the loss must be a scalar, got shape {tuple(loss.shape)} in stage {stage}"
            assert bool(torch.isfinite(loss)), f"the loss is {loss.item()} in stage {stage}"
            gradient = torch.autograd.grad(loss, batch.student, allow_unused=True)[0] if loss.requires_grad else None
            assert gradient is not None and gradient.any(), f"the loss does not depend on the student in stage {stage}"
            assert bool(torch.isfinite(gradient).all()), f"the gradient is not finite in stage {stage}"


def leaves_its_inputs_alone(config: str | dict[str, Any]) -> None:
    """The loss changes no tensor of the batch, and draws from no global generator."""
    rule = _started(config)
    if not rule.adds_loss:
        return
    batch = _batch(2, soft=False)
    before = {name: value.clone() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    state = torch.get_rng_state()
    first, second = rule.loss(batch), rule.loss(batch)
    for name, value in before.items():
        assert torch.equal(value, getattr(batch, name)), f"the loss changes batch.{name}"
    assert torch.equal(state, torch.get_rng_state()), "the loss draws random numbers"
    assert torch.allclose(first, second, rtol=0, atol=0, equal_nan=True), "two calls on one batch differ"


def does_not_see_what_it_says_it_does_not(config: str | dict[str, Any]) -> None:
    """With ``sees_earlier`` False the earlier logits are empty, and the loss does without."""
    rule = _started(config)
    if rule.adds_loss and not rule.sees_earlier:
        batch = _batch(2, soft=False)
        blind = Batch(**{**vars(batch), "earlier": batch.earlier[:0]})
        assert torch.equal(rule.loss(batch), rule.loss(blind)), (
            "the loss reads earlier logits, but sees_earlier is False"
        )


def judges_and_keeps_its_state(config: str | dict[str, Any]) -> None:
    """Verdicts are verdicts, judging alone changes nothing, and saved buffers restore the rule."""
    rule = _started(config)
    if not rule.judges:
        return
    student, teacher = _logits(0), _logits(1)
    before = copy.deepcopy(rule.state_dict())
    verdict = rule.finish_stage(student, teacher, 1)
    assert isinstance(verdict, Verdict) and isinstance(verdict.passed, bool), "finish_stage must return a Verdict"
    assert all(isinstance(value, (int, float)) for value in verdict.metrics.values()), "metrics must be numbers"
    assert "\n" not in verdict.message, "the message must be one line"
    same = all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
    assert same, "finish_stage changes the rule: a rejected student would count; use accept_stage"
    rule.accept_stage(student, teacher, 1)
    restored = _started(config)
    restored.load_state_dict(rule.state_dict())
    again, copied = rule.finish_stage(student, teacher, 2), restored.finish_stage(student, teacher, 2)
    assert again == copied, "a rule with the buffers of another judges differently: keep all state in buffers"


CHECKS: list[Callable[[str | dict[str, Any]], None]] = [
    has_sound_attributes,
    gives_a_finite_loss_with_a_gradient,
    leaves_its_inputs_alone,
    does_not_see_what_it_says_it_does_not,
    judges_and_keeps_its_state,
]


def _started(config: str | dict[str, Any]) -> Rule:
    rule = build_rule(config)
    rule.start(SAMPLES, CLASSES)
    return rule


def _logits(seed: int) -> Tensor:
    return torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(seed)) * 5


def _batch(stage: int, soft: bool) -> Batch:
    index = torch.tensor([7, 0, 3, 11])
    labels = torch.tensor([0, 2, 1, 2])
    return Batch(
        student=_logits(10)[index].requires_grad_(),
        teacher=_logits(1)[index],
        earlier=torch.stack([_logits(20 + t)[index] for t in range(STAGES)])[: stage - 1],
        targets=0.7 * F.one_hot(labels, CLASSES).float() + 0.1 if soft else labels,
        index=index,
        stage=stage,
    )
