"""What only shows when it runs: schedulers that fail as they step, and rules of third parties that are no good."""

import logging
import re

import pytest


def schedule(config):
    return config["train"]["init"]["kwargs"]


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"key": "CosineAnnealingLR", "kwargs": {"T_max": [2]}}, "T_max must be a number, got a list"),
        ({"key": "CosineAnnealingLR", "kwargs": {"T_max": 0}}, "fails as it steps: ZeroDivisionError"),
        ({"key": "StepLR", "kwargs": {"step_size": 0}}, "scheduler StepLR fails as it steps: ZeroDivisionError"),
        ({"key": "StepLR", "kwargs": {"step_size": 1, "gamma": "a"}}, "gamma must be a number, got 'a'"),
        (
            {"key": "OneCycleLR", "kwargs": {"max_lr": 0.1, "total_steps": 1}},
            "the scheduler is made for 1 steps, but the stage takes 2",
        ),
        (
            {"key": "OneCycleLR", "kwargs": {"max_lr": 0.1, "total_steps": 5}, "scheduling_step": 1},
            "the scheduler is made for 5 steps, but the stage takes 6",
        ),
        (
            {"key": "ReduceLROnPlateau", "kwargs": {}, "scheduling_step": 1},
            "ReduceLROnPlateau steps on the validation's accuracy: remove scheduling_step",
        ),
    ],
    ids=str,
)
def test_schedulers_that_would_fail_later(scheduler, message, progressive, run, errors):
    schedule(progressive).update(num_epochs=2, scheduler=scheduler)
    for command in ("check", "train"):
        code, folder = run(progressive, command=command)
        (line,) = errors()
        assert code == 2 and not folder.exists()
        assert re.match("line .*: (train.stage1: |progressive.scheduler.kwargs.)", line) and message in line, line


@pytest.mark.parametrize(
    "scheduler",
    [
        {"key": "OneCycleLR", "kwargs": {"max_lr": 0.1, "total_steps": 6}, "scheduling_step": 1},
        {"key": "ReduceLROnPlateau", "kwargs": {"patience": 1}},
        {"key": "MultiStepLR", "kwargs": {"milestones": [1], "gamma": 0.1}},
        {"key": "CosineAnnealingWarmRestarts", "kwargs": {"T_0": 1}},
    ],
    ids=lambda value: value["key"],
)
def test_schedulers_that_are_fine(scheduler, progressive, run):
    schedule(progressive).update(num_epochs=2, scheduler=scheduler)
    assert run(progressive, command="check")[0] == 0


@pytest.mark.parametrize(("accumulated", "every", "steps"), [(1, 2, 4), (2, 1, 4), (3, 2, 1), (2, 3, 1)])
def test_schedulers_that_do_not_step_at_every_batch(accumulated, every, steps, progressive, run, errors):
    """Of 9 batches in 3 epochs: the count goes on from epoch to epoch, and the optimizer's step must be due as well."""
    schedule(progressive)["optimizer"]["grad_accum_step"] = accumulated
    for total in (steps, steps - 1):
        scheduler = {"key": "LinearLR", "kwargs": {"total_iters": 2}, "scheduling_step": every}
        if total > 0:
            scheduler |= {"key": "OneCycleLR", "kwargs": {"max_lr": 0.1, "total_steps": total}}
        schedule(progressive).update(num_epochs=3, scheduler=scheduler)
        assert run(progressive, output=f"for_{total}")[0] == (2 if 0 < total < steps else 0)
    assert steps == 1 or f"made for {steps - 1} steps, but the stage takes {steps}" in errors()[0]


RULES = """
import torch
from timm_mamba_pkd.distillation import Rule

class NoLoss(Rule):
    pass

class GivesNone(Rule):
    def loss(self, batch):
        pass

class GivesANumber(Rule):
    def loss(self, batch):
        return 1.0

class GivesOneOfEach(Rule):
    def loss(self, batch):
        return batch.student.square().mean(1)

class Detached(Rule):
    def loss(self, batch):
        return batch.teacher.mean()

class NoSuper(Rule):
    def __init__(self):
        self.factor = 1
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("third_party.NoLoss", "rule NoLoss has adds_loss, but no method loss"),
        ("third_party.GivesNone", "rule GivesNone: loss must return a tensor of one number, not NoneType"),
        ("third_party.GivesANumber", "rule GivesANumber: loss must return a tensor of one number, not float"),
        ("third_party.GivesOneOfEach", "loss must return a tensor of one number, not shape (8,)"),
        ("third_party.Detached", "rule Detached: its loss does not depend on the student"),
        ("third_party.NoSuper", "rule third_party.NoSuper: its __init__ must call super().__init__()"),
        ("third_party.Missing", "rule third_party.Missing cannot be imported: AttributeError"),
        ("broken.Rule", "rule broken.Rule cannot be imported: SyntaxError"),
        ("exits.Rule", "rule exits.Rule cannot be imported: SystemExit"),
    ],
)
def test_rules_that_are_no_good(name, message, progressive, run, errors, tmp_path, monkeypatch):
    for module, text in (("third_party", RULES), ("broken", "class Rule(:"), ("exits", "import sys; sys.exit(0)")):
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    schedule(progressive)["rule"] = name
    assert run(progressive, command="check")[0] == 2
    (line,) = errors()
    assert message in line and line.startswith("line "), line


def test_views_that_are_no_section(progressive, run, errors):
    schedule(progressive)["views"] = 16
    assert run(progressive, command="check")[0] == 2
    (line,) = errors()
    assert "views must be a section" in line


@pytest.mark.parametrize("lost", ["fake/train", "train"])
def test_a_lost_import_call(lost, progressive, run, errors):
    where = progressive if lost == "train" else progressive["datasets"]
    where[lost] = dict(where[lost])
    assert run(progressive, command="check")[0] == 2
    (line,) = errors()
    name = "train" if lost == "train" else f"datasets.{lost}"
    assert line.endswith(f"{name} has a 'key', but is not called: write !import_call before it")


def test_a_dependency_that_exits(progressive, run, errors, tmp_path, monkeypatch):
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    progressive["dependencies"].append({"name": "leaves"})
    assert run(progressive, command="check")[0] == 2
    (line,) = errors()
    assert "SystemExit" in line


def test_a_teacher_without_weights_is_warned_about(progressive, run, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        assert run(progressive, command="check")[0] == 0
    assert "the teacher has no weights (src_ckpt, pretrained): its logits are random" in caplog.text
    caplog.clear()
    progressive["models"]["teacher_model"]["kwargs"]["pretrained"] = False
    progressive["models"]["teacher_model"]["src_ckpt"] = str(tmp_path / "no.pt")
    assert run(progressive, command="check")[0] == 2  # there is no such file
    assert "the teacher has no weights" not in caplog.text
