"""Progressive stages in torchdistill's own box: what trains, what stays, and what the losses see."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchdistill.losses.mid_level import ATLoss, DISTLoss, KDLoss, LogitStdKDLoss

from timm_mamba_pkd import MambaPKDEnsemble
from timm_mamba_pkd.distillation import StageWrapper
from timm_mamba_pkd.distillation.rules import Residual
from timm_mamba_pkd.models import Confidence

RESIDUAL: dict[str, Any] = {"key": "residual"}
LOGITS: dict[str, Any] = {
    "student_module_path": ".",
    "student_module_io": "output",
    "teacher_module_path": ".",
    "teacher_module_io": "output",
}


@pytest.mark.parametrize("rule", ["residual", "independent", "bdistil"])
def test_only_the_student_of_the_stage_changes(tiny, rule):
    teacher, ensemble = tiny.teacher_and_students()
    box = tiny.box_of(teacher, ensemble, tiny.schedule(rule=rule))
    modes: list[tuple[str, bool]] = []
    teacher.register_forward_pre_hook(lambda module, args: modes.append(("teacher", module.training)))
    for i, student in enumerate(ensemble.students):
        for module in student.modules():
            module.register_forward_pre_hook(lambda module, args, i=i: modes.append((f"student{i}", module.training)))
    first_wrapper, teacher_before, optimizers = box.student_model, tiny.snapshot(teacher), []

    for k in (1, 2, 3):
        before = [tiny.snapshot(student) for student in ensemble.students]
        own = {id(parameter) for parameter in ensemble.students[k - 1].parameters()}
        held = [id(parameter) for group in box.optimizer.param_groups for parameter in group["params"]]
        assert len(held) == len(own) and set(held) == own
        assert box.optimizer.state == {} and box.optimizer.param_groups[0]["lr"] == 0.01
        optimizers.append(box.optimizer)
        assert box.stage_number == k and int(ensemble.num_active) == k

        for epoch in range(2):
            modes.clear()
            tiny.train_one_epoch(box, epoch)
            seen = set(modes)
            assert ("teacher", False) in seen and ("teacher", True) not in seen
            earlier = {(f"student{i}", False) for i in range(k - 1)} if rule == "residual" else set()
            assert seen == {("teacher", False), (f"student{k - 1}", True)} | earlier
            assert not any(p.requires_grad for p in teacher.parameters())
            # The example script validates the model of the first stage, in all stages.
            with torch.inference_mode():
                x = torch.randn(2, 1, 8, 8)
                mean = torch.stack([student.eval()(x) for student in ensemble.students[:k]]).mean(0)
                torch.testing.assert_close(first_wrapper.eval()(x), mean)
                torch.testing.assert_close(ensemble(x), mean)
            box.post_epoch_process()

        assert tiny.same(teacher, teacher_before)
        changed = [not tiny.same(student, state) for student, state in zip(ensemble.students, before, strict=True)]
        assert changed == [i == k - 1 for i in range(3)]
        statistics = before[k - 1]["stem.norm.running_mean"], ensemble.students[k - 1].stem.norm.running_mean
        assert not torch.equal(*statistics)
    assert len(set(map(id, optimizers))) == 3
    box.clean_modules()
    assert int(ensemble.num_active) == 3
    assert all(p.requires_grad for p in ensemble.parameters())


def test_losses_see_the_current_student_and_the_earlier_ones(tiny):
    teacher, ensemble = tiny.teacher_and_students()
    rule = {"key": "residual", "kwargs": {"weight": 0.3, "temperature": 2.0, "step": 0.5}}
    box = tiny.box_of(teacher, ensemble, tiny.schedule(num_epochs=1, rule=rule, scheduler=None))
    x, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    for k in (1, 2, 3):
        box.pre_epoch_process(epoch=k)
        loss = box.forward_process(x, labels, {"index": torch.arange(6)})
        with torch.no_grad():
            own = ensemble.students[k - 1](x)
            target = g = teacher.eval()(x)
            if k > 1:
                target = g + 0.5 * (k - 1) * (g - torch.stack([s(x) for s in ensemble.students[: k - 1]]).mean(0))
        kl = F.kl_div((own / 2).log_softmax(-1), (target / 2).softmax(-1), reduction="batchmean")
        torch.testing.assert_close(loss.detach(), 0.5 * F.cross_entropy(own, labels) + 0.3 * 4 * kl)
        loss.backward()
        for i, student in enumerate(ensemble.students, start=1):
            assert [p.grad is not None for p in student.parameters()] == [i == k] * len(list(student.parameters()))
        ensemble.zero_grad(set_to_none=True)
        box.post_epoch_process()


def at_pair(path: str, io: str) -> dict[str, Any]:
    return {
        "at_pairs": {"p": {"teacher": {"io": "output", "path": "layer1"}, "student": {"io": io, "path": path}}},
        "mode": "paper",
    }


@pytest.mark.parametrize(
    ("loss", "path", "io"),
    [
        (KDLoss(**LOGITS, temperature=2.0, alpha=0.4), None, None),
        (LogitStdKDLoss(**LOGITS, temperature=2.0, alpha=0.4), None, None),
        (DISTLoss(**LOGITS), None, None),
        (ATLoss(**at_pair("stages.1", "output")), "stages.1", "output"),
        (ATLoss(**at_pair("stages.2.downsample.depthwise", "input")), "stages.2.downsample.depthwise", "input"),
    ],
    ids=["KDLoss", "LogitStdKDLoss", "DISTLoss", "ATLoss", "ATLoss-stage-output"],
)
def test_losses_of_torchdistill_work_unchanged(tiny, loss, path, io):
    teacher, ensemble = tiny.teacher_and_students()
    hooks = {"forward_hook": {io: [path]}} if path else {}
    criterion = {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"theirs": {"criterion": loss, "weight": 1.0}}}}
    train = tiny.schedule(
        num_epochs=1,
        rule="independent",
        scheduler=None,
        criterion=criterion,
        student=hooks,
        teacher={"forward_hook": {"output": ["layer1"]}} if path else {},
    )
    box = tiny.box_of(teacher, ensemble, train)
    box.pre_epoch_process(epoch=0)
    box.post_epoch_process()
    box.pre_epoch_process(epoch=1)  # stage 2: its student follows one that has the same modules
    x, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    found = box.forward_process(x, labels, {})
    found.backward()
    ensemble.students[1].zero_grad()  # nothing else has gradients
    assert all(p.grad is None for p in ensemble.parameters())

    features: dict[str, dict[str, Tensor]] = {}

    def record(name: str, at: str) -> Any:
        return lambda module, args, output: features.update({name: {at: args[0] if at == "input" else output}})

    if path:
        ensemble.students[1].get_submodule(path).register_forward_hook(record(path, io))
        teacher.get_submodule("layer1").register_forward_hook(record("layer1", "output"))
    student_io, teacher_io = (features | {".": {"output": model(x)}} for model in (ensemble.students[1], teacher))
    torch.testing.assert_close(found, loss(features | student_io, features | teacher_io, labels))
    assert found > 0


def test_fitnet_hint_on_part_of_the_student(tiny):
    teacher, ensemble = tiny.teacher_and_students()
    hint = {
        "criterion": {"key": "MSELoss", "kwargs": {}},
        "criterion_wrapper": {
            "key": "SimpleLossWrapper",
            "kwargs": {
                "input": {"is_from_teacher": False, "module_path": "+hint", "io": "output"},
                "target": {"is_from_teacher": True, "module_path": "act1", "io": "output"},
            },
        },
        "weight": 1.0,
    }
    regressor = {"num_input_channels": 12, "num_output_channels": 32, "kernel_size": 1, "stride": 1, "padding": 0}
    train = tiny.schedule(
        students=tiny.STUDENTS[:2],
        rule="independent",
        criterion={"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"hint": hint}}},
        teacher={"sequential": ["conv1", "bn1", "act1"], "forward_hook": {"output": ["act1"]}},
        student={
            "sequential": ["stem", "stages.0", "+hint"],
            "adaptations": {"hint": {"key": "ConvReg", "kwargs": regressor}},
            "forward_hook": {"output": ["+hint"]},
        },
    )
    box = tiny.box_of(teacher, ensemble, train)
    trained = {"stem.conv", "stem.norm", "stages.0"}
    for k in (1, 2):
        before = [tiny.snapshot(student) for student in ensemble.students]
        for epoch in range(2):
            tiny.train_one_epoch(box, epoch)
            assert int(box.train_data_loader.dataset.view) == epoch
            box.post_epoch_process()
        for i, student in enumerate(ensemble.students, start=1):
            changed = {
                name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[i - 1][name])
            }
            assert {".".join(name.split(".")[:2]) for name in changed} == (trained if i == k else set())


def test_frozen_modules_are_the_current_students(tiny):
    teacher, ensemble = tiny.teacher_and_students()
    box = tiny.box_of(teacher, ensemble, tiny.schedule(student={"frozen_modules": ["stem"]}))
    trainable = {name for name, p in ensemble.named_parameters() if p.requires_grad}
    assert trainable == {
        f"students.0.{n}" for n, _ in ensemble.students[0].named_parameters() if not n.startswith("stem")
    }
    held = sum(len(group["params"]) for group in box.optimizer.param_groups)
    assert held == len(trainable)


def test_wrapper_saves_and_loads_as_the_ensemble(tiny):
    _, ensemble = tiny.teacher_and_students()
    wrapper = StageWrapper(ensemble, stage=2, name=ensemble.names[1], rule=RESIDUAL)
    state = wrapper.state_dict()
    assert list(state) == list(ensemble.state_dict())
    fresh = MambaPKDEnsemble(tiny.STUDENTS, num_classes=3, in_chans=1, img_size=8)
    StageWrapper(fresh, stage=1, name=fresh.names[0], rule=RESIDUAL).load_state_dict(state)
    assert tiny.same(fresh, state) and int(fresh.num_active) == 2
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapper.nothing


def test_wrapper_refuses(tiny):
    _, ensemble = tiny.teacher_and_students()
    with pytest.raises(ValueError, match="stage 4 has no student: the ensemble has 3"):
        StageWrapper(ensemble, stage=4, name="mamba_pkd_s1", rule=RESIDUAL)
    with pytest.raises(ValueError, match="trains a mamba_pkd_ensemble, but the student is MambaPKD"):
        StageWrapper(ensemble.students[0], stage=1, name="mamba_pkd_s1", rule=RESIDUAL)
    with pytest.raises(ValueError, match="stage 1 is to train mamba_pkd_s7, but the ensemble's students are mamba_pkd"):
        StageWrapper(ensemble, stage=1, name="mamba_pkd_s7", rule=RESIDUAL)


def test_a_rule_may_refuse_a_combination(tiny, monkeypatch):
    _, ensemble = tiny.teacher_and_students()
    ensemble.set_combination("per_class")
    monkeypatch.setattr(Residual, "combinations", ("mean", "per_student"))
    message = "the rule combines the students by mean or per_student, but the ensemble's combination is per_class"
    with pytest.raises(ValueError, match=message):
        StageWrapper(ensemble, stage=1, name="mamba_pkd_s1", rule=RESIDUAL)
    ensemble.set_combination("per_student")
    StageWrapper(ensemble, stage=1, name="mamba_pkd_s1", rule=RESIDUAL)


def test_a_stage_drops_the_policy_of_other_weights(tiny, caplog):
    """Under torchdistill's own script nothing else does: the box never runs the ensemble itself in training mode."""
    teacher, ensemble = tiny.teacher_and_students()
    ensemble.policy = Confidence([0.5] * (len(ensemble.students) - 1))
    tiny.box_of(teacher, ensemble, tiny.schedule())
    assert ensemble.policy is None
    assert caplog.text.count("The policy of early exit is dropped") == 1
