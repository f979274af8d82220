"""The contract holds for every rule of ours, and each of its checks catches the rules it is meant for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mamba_pkd.distillation.rules import RULES, Batch, Rule, Verdict, contract

EXTREMES: dict[str, list[dict[str, Any]]] = {
    "independent": [{}],
    "residual": [
        {},
        {"weight": 1e-6, "temperature": 1e-2, "step": 0.0},
        {"weight": 1e6, "temperature": 1e3, "step": 1.0},
    ],
    "assistant": [{}, {"weight": 1e-6, "temperature": 1e-2}, {"weight": 1e6, "temperature": 1e3}],
    "bdistil": [
        {},
        {"weight": 1e-6, "step_size": 1e-9, "barrier": 1e-3, "slack": 0.0, "max_retries": 0},
        {"weight": 1e6, "step_size": 1.0, "barrier": 1e9, "slack": 1.0, "max_retries": 9},
    ],
}


def test_every_rule_of_ours_is_checked():
    assert EXTREMES.keys() == RULES.keys()


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize(
    "config", [{"key": key, "kwargs": kwargs} for key, each in EXTREMES.items() for kwargs in each], ids=str
)
def test_our_rules_keep_it(config, check):
    check(config)


class Sound(Rule):
    """What the broken rules below start from; it keeps the contract."""

    sees_earlier = True
    judges = True

    k: Tensor

    def start(self, num_samples: int, num_classes: int) -> None:
        self.register_buffer("k", torch.zeros(()))

    def loss(self, batch: Batch) -> Tensor:
        return F.mse_loss(batch.student, batch.teacher)

    def finish_stage(self, student: Tensor, teacher: Tensor, stage: int) -> Verdict:
        return Verdict(True, {"k": float(self.k)}, "fine")

    def accept_stage(self, student: Tensor, teacher: Tensor, stage: int) -> None:
        self.k += 1


class TrainsAStudentTwice(Sound):
    def order(self, num_students: int) -> list[int]:
        return [0] * num_students


class HasParameters(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))


class RetriesWithoutAVerdict(Sound):
    judges = False
    max_retries = 1


class CombinesByMedian(Sound):
    combinations = ("median",)


class LossOfEverySample(Sound):
    def loss(self, batch: Batch) -> Tensor:
        return (batch.student - batch.teacher).square().mean(1)


class LogOfNegativeNumbers(Sound):
    def loss(self, batch: Batch) -> Tensor:
        return batch.student.log().mean()


class InfiniteGradient(Sound):
    def loss(self, batch: Batch) -> Tensor:
        return (batch.student - batch.student.detach()).abs().sqrt().sum()


class ForgetsTheStudent(Sound):
    def loss(self, batch: Batch) -> Tensor:
        return batch.teacher.square().mean()


class DetachesTheStudent(Sound):
    def loss(self, batch: Batch) -> Tensor:
        return F.mse_loss(batch.student.detach(), batch.teacher)


class FailsInLaterStages(Sound):
    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) / (3 - batch.stage)


class ScalesTheTeacherInPlace(Sound):
    def loss(self, batch: Batch) -> Tensor:
        return F.mse_loss(batch.student, batch.teacher.mul_(0.5))


class AddsNoise(Sound):
    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) * torch.rand(())


class CountsItsCalls(Sound):
    calls = 0

    def loss(self, batch: Batch) -> Tensor:
        self.calls += 1
        return super().loss(batch) * self.calls


class PeeksAtEarlierStudents(Sound):
    sees_earlier = False

    def loss(self, batch: Batch) -> Tensor:
        return F.mse_loss(batch.student, batch.teacher - batch.earlier.sum(0))


class ChangesWhileJudging(Sound):
    def finish_stage(self, student: Tensor, teacher: Tensor, stage: int) -> Verdict:
        self.accept_stage(student, teacher, stage)
        return super().finish_stage(student, teacher, stage)


class KeepsStateOutsideOfBuffers(Sound):
    accepted = 0

    def finish_stage(self, student: Tensor, teacher: Tensor, stage: int) -> Verdict:
        return Verdict(self.accepted == 0, {}, "fine")

    def accept_stage(self, student: Tensor, teacher: Tensor, stage: int) -> None:
        self.accepted += 1


class SaysALot(Sound):
    def finish_stage(self, student: Tensor, teacher: Tensor, stage: int) -> Verdict:
        return Verdict(True, {}, "one\ntwo")


class SaysTrue(Sound):
    def finish_stage(self, student: Tensor, teacher: Tensor, stage: int) -> Any:
        return True


class PassesATensor(Sound):
    def finish_stage(self, student: Tensor, teacher: Tensor, stage: int) -> Any:
        return Verdict((student > teacher).any(), {}, "fine")  # pyright: ignore[reportArgumentType]


class MeasuresTensors(Sound):
    def finish_stage(self, student: Tensor, teacher: Tensor, stage: int) -> Any:
        return Verdict(True, {"worst": student.min()}, "fine")  # pyright: ignore[reportArgumentType]


BROKEN: list[tuple[type[Rule], Any, str]] = [
    (TrainsAStudentTwice, contract.has_sound_attributes, r"order\(2\) must name each of 2 students once"),
    (HasParameters, contract.has_sound_attributes, "what a rule keeps belongs into buffers"),
    (CombinesByMedian, contract.has_sound_attributes, "combinations must be some of mean, per_student, per_class"),
    (RetriesWithoutAVerdict, contract.has_sound_attributes, "only a rule that judges can ask for retries"),
    (LossOfEverySample, contract.gives_a_finite_loss_with_a_gradient, r"must be a scalar, got shape \(4,\) in stage 1"),
    (LogOfNegativeNumbers, contract.gives_a_finite_loss_with_a_gradient, "the loss is nan in stage 1"),
    (InfiniteGradient, contract.gives_a_finite_loss_with_a_gradient, "the gradient is not finite in stage 1"),
    (ForgetsTheStudent, contract.gives_a_finite_loss_with_a_gradient, "does not depend on the student in stage 1"),
    (DetachesTheStudent, contract.gives_a_finite_loss_with_a_gradient, "does not depend on the student in stage 1"),
    (FailsInLaterStages, contract.gives_a_finite_loss_with_a_gradient, "the loss is inf in stage 3"),
    (ScalesTheTeacherInPlace, contract.leaves_its_inputs_alone, "the loss changes batch.teacher"),
    (AddsNoise, contract.leaves_its_inputs_alone, "the loss draws random numbers"),
    (CountsItsCalls, contract.leaves_its_inputs_alone, "two calls on one batch differ"),
    (PeeksAtEarlierStudents, contract.does_not_see_what_it_says_it_does_not, "reads earlier logits"),
    (ChangesWhileJudging, contract.judges_and_keeps_its_state, "finish_stage changes the rule"),
    (KeepsStateOutsideOfBuffers, contract.judges_and_keeps_its_state, "keep all state in buffers"),
    (SaysALot, contract.judges_and_keeps_its_state, "the message must be one line"),
    (SaysTrue, contract.judges_and_keeps_its_state, "finish_stage must return a Verdict"),
    (PassesATensor, contract.judges_and_keeps_its_state, "finish_stage must return a Verdict"),
    (MeasuresTensors, contract.judges_and_keeps_its_state, "metrics must be numbers"),
]


@pytest.mark.parametrize("check", contract.CHECKS)
def test_a_sound_rule_of_anybody_keeps_it(check):
    check(f"{__name__}.Sound")


@pytest.mark.parametrize(("rule", "meant", "message"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_rule_is_caught_by_the_check_meant_for_it(rule, meant, message):
    for check in contract.CHECKS:
        if check is meant:
            with pytest.raises(AssertionError, match=message):
                check(f"{__name__}.{rule.__name__}")
        else:
            check(f"{__name__}.{rule.__name__}")


def test_every_check_has_a_rule_that_it_catches():
    assert {meant for _, meant, _ in BROKEN} == set(contract.CHECKS)
