"""What happens around an epoch: caches, verdicts, another try, and the combination's weights."""

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from timm_mamba_pkd.distillation import Batch, Rule, Verdict, finish_stage
from timm_mamba_pkd.distillation.logits_cache import cache_bytes
from timm_mamba_pkd.distillation.rules import Assistant, BDistil
from timm_mamba_pkd.models.combination import fit_weights, uniform_weights

NO_LEARNING = {"optimizer": {"key": "SGD", "kwargs": {"lr": 0.0}}, "scheduler": None}


class Rejects(Rule):
    """Rejects every student and remembers what it was asked."""

    adds_loss = False
    judges = True
    max_retries = 2

    def __init__(self, max_retries: int = 2) -> None:
        super().__init__()
        self.max_retries = max_retries
        self.calls: list[tuple[Any, ...]] = []

    def start(self, num_samples: int, num_classes: int) -> None:
        self.calls.append(("start", num_samples, num_classes))

    def finish_stage(self, student: Tensor, teacher: Tensor, stage: int) -> Verdict:
        self.calls.append(("finish", stage))
        self.logits = student, teacher
        return Verdict(False, {"worst": -1.0}, "no")

    def accept_stage(self, student: Tensor, teacher: Tensor, stage: int) -> None:
        self.calls.append(("accept", stage))


REJECTS = f"{__name__}.Rejects"


def run(tiny: Any, rule: Any, stages: int, cache_dir: str | None = None) -> tuple[list[list[float]], list[list[int]]]:
    """Losses of the first stages with students that do not learn, and how many images the teacher and each student
    had to see in each."""
    teacher, ensemble = tiny.teacher_and_students()
    teacher.eval()
    box = tiny.box_of(teacher, ensemble, tiny.schedule(rule=rule, cache_dir=cache_dir, **NO_LEARNING))
    calls = [tiny.count_calls(model) for model in (teacher, *ensemble.students)]
    losses, counts = [], []
    for _ in range(stages):
        losses.append([])
        before = [sum(each) for each in calls]
        for _ in range(2):
            torch.manual_seed(len(losses))
            losses[-1] += tiny.train_one_epoch(box, 0)
            box.post_epoch_process()
        counts.append([sum(each) - b for each, b in zip(calls, before, strict=True)])
    return losses, counts


@pytest.mark.parametrize("rule", ["residual", "assistant"])
def test_losses_from_the_cache_are_those_without_it(tiny, tmp_path, caplog, rule):
    """Twice, in stages 1 to 3; float16 keeps 11 bits, 5e-4 of a logit."""
    order = [0, 1, 2] if rule == "residual" else [2, 1, 0]
    epochs, samples = 2, 16
    plain, counts = run(tiny, rule, 3)
    assert [count[0] for count in counts] == [epochs * samples] * 3
    with caplog.at_level(logging.INFO):
        first, computed = run(tiny, rule, 3, str(tmp_path))
        again, read = run(tiny, rule, 3, str(tmp_path))
    for k in range(3):
        torch.testing.assert_close(first[k], plain[k], rtol=2e-3, atol=2e-4)
        assert again[k] == first[k], "the same numbers, computed and read"
    assert len({round(loss, 4) for losses in plain for loss in losses}) > 8, "the losses are different ones"
    all_of = epochs * samples
    expected = [[0] * 4 for _ in range(3)]
    for k, position in enumerate(order):
        expected[k][1 + position] = all_of  # trains
        if k < 2:
            expected[k + 1][1 + position] += all_of  # its logits, once
    assert read == [[row[i] if i == 1 + order[k] else 0 for i in range(4)] for k, row in enumerate(expected)]
    expected[0][0] = all_of
    assert computed == expected
    lines = [line for line in caplog.messages if "logits of" in line]
    assert lines[:3] == [
        "Stage 1  logits of teacher: 32 computed, 0 cached",
        "Stage 2  logits of teacher: 0 computed, 32 cached",
        "Stage 2  logits of earlier students: 32 computed, 0 cached",
    ]
    assert len(list(tmp_path.iterdir())) == 3  # the teacher and two students


def test_a_rehearsal_opens_no_cache_and_says_its_size(tiny, tmp_path):
    box = tiny.box_of(*tiny.teacher_and_students(), tiny.schedule(cache_dir=str(tmp_path / "cache"), **NO_LEARNING))
    box.rehearsing = True
    for k in (1, 2):
        for _ in range(2):
            tiny.train_one_epoch(box, 0)
            assert box.student_model.cache_bytes == cache_bytes(16, 3, 2) > 0, k
            box.post_epoch_process()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("early", [False, True])
def test_a_rejected_student_is_trained_again(tiny, caplog, early):
    """With ``early`` the driver ends the stage itself, as ``mamba-pkd train`` does to log the verdict."""
    teacher, ensemble = tiny.teacher_and_students()
    box = tiny.box_of(teacher, ensemble, tiny.schedule(rule=REJECTS, num_epochs=2))
    box.can_extend = True
    rule, optimizers, seen = box.student_model.rule, [], []
    for epoch in tiny.epochs(box):
        wrapper, views = box.student_model, box.train_data_loader.dataset
        in_stage = epoch % 2
        assert wrapper.rule is rule and int(views.view) == in_stage
        seen.append((box.stage_number, [own and own.num_sources for own in ensemble.connections()]))
        if in_stage == 0:
            assert len(optimizers) == epoch // 2
            assert box.optimizer not in optimizers
            optimizers.append(box.optimizer)
            held = {id(p) for group in box.optimizer.param_groups for p in group["params"]}
            modules = [ensemble.students[wrapper.position]]
            if str(wrapper.position) in ensemble.reuse:
                modules.append(ensemble.reuse[str(wrapper.position)])
            own = [p for module in modules for p in module.parameters()]
            assert held == {id(p) for p in own} == {id(p) for p in ensemble.parameters() if p.requires_grad}
            assert box.stage_grad_count == 2 and box.lr_scheduler.last_epoch == 0
            before = tiny.snapshot(ensemble)
        else:
            if early:
                finish_stage(box)
                assert wrapper.verdict is not None and wrapper.verdict.message == "no" and wrapper.student.training
            changed = {n for n, t in ensemble.state_dict().items() if not torch.equal(t, before[n])}
            names = {f"students.{wrapper.position}", f"reuse.{wrapper.position}"}
            assert {".".join(name.split(".")[:2]) for name in changed} <= names
            if str(wrapper.position) in ensemble.reuse:
                assert all(p.any() for p in ensemble.reuse[str(wrapper.position)].parameters()), "they learn"
    none, one, two = [None] * 3, [None, 1, None], [None, 1, 1]
    tries = [(1, none), (2, none), (2, one), (3, one), (3, two), (3, [None, 1, 2])]
    assert seen == [each for each in tries for _ in range(2)]
    assert box.num_epochs == box.current_epoch == 12
    assert rule.calls == [
        ("start", 16, 3),
        *[("finish", 1), ("accept", 1)],
        *[("finish", 2), ("finish", 2), ("accept", 2)],
        *[("finish", 3), ("finish", 3), ("finish", 3), ("accept", 3)],
    ]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    no_more = "there are no more students before it whose features it could reuse"
    assert warnings == [
        f"Stage 1 goes on as it is: {no_more}",
        f"Stage 2 goes on as it is: {no_more}",
        "Stage 3 goes on as it is: it was trained 3 times",
    ]
    assert ensemble.active.all()


def test_a_student_goes_on_from_where_it_was(tiny):
    teacher, ensemble = tiny.teacher_and_students()
    box = tiny.box_of(teacher, ensemble, tiny.schedule(rule=REJECTS, num_epochs=1))
    box.can_extend = True
    x = torch.randn(2, 1, 8, 8)
    for epoch in itertools.islice(tiny.epochs(box), 3):
        if epoch == 1:
            before = ensemble.alone(1).eval()(x)
            box.post_epoch_process(metrics=0.0)
            assert box.stage_number == 2 and str(1) in ensemble.reuse
            torch.testing.assert_close(ensemble.alone(1).eval()(x), before, rtol=0, atol=0)
            break


@pytest.mark.parametrize(
    ("students", "rule", "extend", "reason"),
    [
        (None, REJECTS, False, "training it again needs the mamba-pkd command"),
        (None, {"key": REJECTS, "kwargs": {"max_retries": 0}}, True, "the rule allows no retry"),
        (
            ["resnet18", "mamba_pkd_s1", "mamba_pkd_s1"],
            {"key": REJECTS, "kwargs": {"max_retries": 1}},
            True,
            "only Mamba students can reuse the features of Mamba students",
        ),
    ],
)
def test_a_rejected_student_that_cannot_be_trained_again(tiny, caplog, students, rule, extend, reason):
    students = students or tiny.STUDENTS
    teacher, ensemble = tiny.teacher_and_students(students)
    box = tiny.box_of(teacher, ensemble, tiny.schedule(students=students, rule=rule, num_epochs=1))
    if extend:
        box.can_extend = True
    epochs = list(tiny.epochs(box))
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert f"Stage 2 goes on as it is: {reason}" in warned
    retried = "resnet18" in students  # the third student can reuse the second's features
    assert len(epochs) == 3 + retried and len(warned) == 3
    assert list(ensemble.reuse) == (["2"] if retried else [])


def test_the_rule_judges_view_0_of_every_sample_by_index(tiny):
    teacher, ensemble = tiny.teacher_and_students()
    box = tiny.box_of(teacher, ensemble, tiny.schedule(rule=REJECTS, num_epochs=2))
    views = box.train_data_loader.dataset
    for _ in itertools.islice(tiny.epochs(box), 2):
        pass
    finish_stage(box)
    images = torch.stack([views.get(i, 0)[0] for i in range(16)])
    with torch.no_grad():
        expected = ensemble.students[0].eval()(images), teacher.eval()(images)
    torch.testing.assert_close(box.student_model.rule.logits, expected)


def test_bdistil_in_the_box(tiny, monkeypatch):
    """Edges and weights, from the logits that the rule is given; the buffers live from stage to stage."""
    given: list[tuple[Tensor, Tensor]] = []
    accept = BDistil.accept_stage

    def record(self: BDistil, student: Tensor, teacher: Tensor, stage: int) -> None:
        given.append((student, teacher))
        accept(self, student, teacher, stage)

    monkeypatch.setattr(BDistil, "accept_stage", record)
    rule = {"key": "bdistil", "kwargs": {"slack": 0.0, "step_size": 0.5, "max_retries": 1}}
    teacher, ensemble = tiny.teacher_and_students()
    box = tiny.box_of(teacher, ensemble, tiny.schedule(rule=rule, num_epochs=1))
    box.can_extend = True
    k_plus, k_minus, verdicts = torch.full((16, 3), 1 / 16), torch.full((16, 3), 1 / 16), []
    shared = box.student_model.rule
    for _ in tiny.epochs(box):
        wrapper, before = box.student_model, len(given)
        assert wrapper.rule is shared
        torch.testing.assert_close(shared.k_plus, k_plus)
        finish_stage(box)
        verdicts.append(wrapper.verdict)
        assert sorted(wrapper.verdict.metrics) == ["failing_classes", "worst_edge"]
        if len(given) > before:
            (student, target) = given[-1]
            k_plus = k_plus * (-0.5 * (student - target)).exp()
            k_minus = k_minus * (0.5 * (student - target)).exp()
            k_plus, k_minus = k_plus / k_plus.sum(0), k_minus / k_minus.sum(0)
        else:
            assert not wrapper.verdict.passed and not wrapper.finished
    assert len(given) == 3 and not verdicts[0].passed, "without slack the first student cannot pass"
    assert len(verdicts) == 3 + len(ensemble.reuse)
    torch.testing.assert_close(dict(shared.state_dict()), {"k_plus": k_plus, "k_minus": k_minus})


def test_assistants_are_trained_from_the_last_to_the_first(tiny, monkeypatch):
    batches: list[Batch] = []
    loss = Assistant.loss
    monkeypatch.setattr(Assistant, "loss", lambda self, batch: (batches.append(batch), loss(self, batch))[1])
    teacher, ensemble = tiny.teacher_and_students()
    box = tiny.box_of(teacher, ensemble, tiny.schedule(rule="assistant", num_epochs=1))
    x, order, trained = torch.randn(4, 1, 8, 8), [2, 1, 0], []
    for epoch in tiny.epochs(box):
        before = [tiny.snapshot(student) for student in ensemble.students]
        assert box.student_model.position == order[epoch]
        assert ensemble.active_positions == sorted(order[: epoch + 1])
        box.forward_process(x, torch.zeros(4, dtype=torch.long), {"index": torch.arange(4)})
        with torch.no_grad():
            expected = [ensemble.students[i].eval()(x) for i in trained]
        torch.testing.assert_close(list(batches[-1].earlier), expected)
        assert batches[-1].stage == epoch + 1 and len(batches[-1].earlier) == epoch
        box.student_model.train()
        assert all(tiny.same(ensemble.students[i], before[i]) for i in trained)
        trained.append(order[epoch])
    assert ensemble.active.all()


@pytest.mark.parametrize("rule", ["independent", REJECTS, "assistant"])
@pytest.mark.parametrize("combination", ["mean", "per_student", "per_class"])
def test_the_combination_is_fitted_on_the_validation_split(tiny, combination, rule):
    """After every stage, where the first students are trained: with assistants not before the last."""
    teacher, ensemble = tiny.teacher_and_students(combination=combination)
    data = tiny.Digits(noise=0.0)
    box = tiny.box_of(teacher, ensemble, tiny.schedule(rule=rule, num_epochs=1), data)
    uniform = uniform_weights(3, 3, combination)
    for epoch in tiny.epochs(box):
        finish_stage(box)
        if combination == "mean":
            assert ensemble.weights is None
            continue
        assert ensemble.weights is not None and uniform is not None
        fitted = 0 if rule == "assistant" and epoch < 2 else epoch + 1
        torch.testing.assert_close(ensemble.weights[fitted:], uniform[fitted:], rtol=0, atol=0)
        with torch.no_grad():
            logits = torch.stack([student.eval()(data.images) for student in ensemble.students])
        box.student_model.train()
        for k in range(1, fitted + 1):
            row = fit_weights(logits[:k], torch.tensor(data.targets), per_class=combination == "per_class")
            torch.testing.assert_close(ensemble.weights[k - 1, :k], row, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(row, uniform[k - 1, :k], atol=1e-3)
            assert not ensemble.weights[k - 1, k:].any()
