"""Progressive stages in torchdistill's own box: what trains, what stays, and what the losses see."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import RandomSampler, SequentialSampler, TensorDataset
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.losses.mid_level import ATLoss, DISTLoss, KDLoss, LogitStdKDLoss

from timm_mamba_pkd import MambaPKDEnsemble, progressive
from timm_mamba_pkd.distillation import StageWrapper

CPU = torch.device("cpu")
STUDENTS = ["mamba_pkd_s1", "mamba_pkd_s1", "mamba_pkd_s2"]
EPOCHS = 2
LOGITS: dict[str, Any] = {
    "student_module_path": ".",
    "student_module_io": "output",
    "teacher_module_path": ".",
    "teacher_module_io": "output",
}


def teacher_and_students() -> tuple[nn.Module, MambaPKDEnsemble]:
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", in_chans=1, num_classes=3)  # has BatchNorm
    return teacher, MambaPKDEnsemble(STUDENTS, num_classes=3, in_chans=1, img_size=8)


def schedule(**changes: Any) -> dict[str, Any]:
    def loader(sampler: Any) -> dict[str, Any]:
        return {"dataset_id": "digits", "sampler": {"class_or_func": sampler}, "kwargs": {"batch_size": 8}}

    labels = {"input": {"is_from_teacher": False, "module_path": ".", "io": "output"}, "target": {"uses_label": True}}
    ce = {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
        "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": labels},
        "weight": 0.5,
    }
    defaults = {
        "students": STUDENTS,
        "num_epochs": EPOCHS,
        "train_data_loader": loader(RandomSampler),
        "val_data_loader": loader(SequentialSampler),
        "optimizer": {"key": "mamba_pkd_adamw", "kwargs": {"lr": 0.01}},
        "scheduler": {"key": "StepLR", "kwargs": {"step_size": 1, "gamma": 0.5}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"ce": ce}}},
    }
    return progressive(**(defaults | changes))


def box_of(teacher: nn.Module, ensemble: nn.Module, train: dict[str, Any]) -> Any:
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = {"digits": TensorDataset(images, torch.arange(16) % 3)}
    return get_distillation_box(teacher, ensemble, data, train, CPU, None, False, 1)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def train_one_epoch(box: Any, epoch: int) -> None:
    """As torchdistill's example script does it."""
    box.pre_epoch_process(epoch=epoch)
    for images, targets, supp_dict in box.train_data_loader:
        box.post_forward_process(loss=box.forward_process(images, targets, supp_dict))


@pytest.mark.parametrize("rule", ["residual", "independent"])
def test_only_the_student_of_the_stage_changes(rule):
    teacher, ensemble = teacher_and_students()
    box = box_of(teacher, ensemble, schedule(rule=rule))
    modes: list[tuple[str, bool]] = []
    teacher.register_forward_pre_hook(lambda module, args: modes.append(("teacher", module.training)))
    for i, student in enumerate(ensemble.students):
        for module in student.modules():
            module.register_forward_pre_hook(lambda module, args, i=i: modes.append((f"student{i}", module.training)))
    first_wrapper, teacher_before, optimizers = box.student_model, snapshot(teacher), []

    for k in (1, 2, 3):
        before = [snapshot(student) for student in ensemble.students]
        own = {id(parameter) for parameter in ensemble.students[k - 1].parameters()}
        held = [id(parameter) for group in box.optimizer.param_groups for parameter in group["params"]]
        assert len(held) == len(own) and set(held) == own
        assert box.optimizer.state == {} and box.optimizer.param_groups[0]["lr"] == 0.01
        optimizers.append(box.optimizer)
        assert box.stage_number == k and int(ensemble.num_active) == k

        for epoch in range(EPOCHS):
            modes.clear()
            train_one_epoch(box, epoch)
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

        assert same(teacher, teacher_before)
        changed = [not same(student, state) for student, state in zip(ensemble.students, before, strict=True)]
        assert changed == [i == k - 1 for i in range(3)]
        statistics = before[k - 1]["stem.norm.running_mean"], ensemble.students[k - 1].stem.norm.running_mean
        assert not torch.equal(*statistics)
    assert len(set(map(id, optimizers))) == 3
    box.clean_modules()
    assert int(ensemble.num_active) == 3
    assert all(p.requires_grad for p in ensemble.parameters())


def test_losses_see_the_current_student_and_the_earlier_ones():
    teacher, ensemble = teacher_and_students()
    rule = {"key": "residual", "kwargs": {"weight": 0.3, "temperature": 2.0, "step": 0.5}}
    box = box_of(teacher, ensemble, schedule(num_epochs=1, rule=rule, scheduler=None))
    x, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    for k in (1, 2, 3):
        box.pre_epoch_process(epoch=k)
        loss = box.forward_process(x, labels, {})
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
def test_losses_of_torchdistill_work_unchanged(loss, path, io):
    teacher, ensemble = teacher_and_students()
    hooks = {"forward_hook": {io: [path]}} if path else {}
    criterion = {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"theirs": {"criterion": loss, "weight": 1.0}}}}
    train = schedule(
        num_epochs=1,
        rule="independent",
        scheduler=None,
        criterion=criterion,
        student=hooks,
        teacher={"forward_hook": {"output": ["layer1"]}} if path else {},
    )
    box = box_of(teacher, ensemble, train)
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


def test_fitnet_hint_on_part_of_the_student():
    teacher, ensemble = teacher_and_students()
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
    train = schedule(
        students=STUDENTS[:2],
        rule="independent",
        criterion={"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"hint": hint}}},
        teacher={"sequential": ["conv1", "bn1", "act1"], "forward_hook": {"output": ["act1"]}},
        student={
            "sequential": ["stem.conv", "stem.norm", "stem.act", "+hint"],
            "adaptations": {"hint": {"key": "ConvReg", "kwargs": regressor}},
            "forward_hook": {"output": ["+hint"]},
        },
    )
    box = box_of(teacher, ensemble, train)
    for k in (1, 2):
        before = [snapshot(student) for student in ensemble.students]
        for epoch in range(EPOCHS):
            train_one_epoch(box, epoch)
            box.post_epoch_process()
        for i, student in enumerate(ensemble.students, start=1):
            changed = {
                name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[i - 1][name])
            }
            assert {name.split(".")[0] for name in changed} == ({"stem"} if i == k else set())


def test_frozen_modules_are_the_current_students():
    teacher, ensemble = teacher_and_students()
    box: DistillationBox = box_of(teacher, ensemble, schedule(student={"frozen_modules": ["stem"]}))
    trainable = {name for name, p in ensemble.named_parameters() if p.requires_grad}
    assert trainable == {
        f"students.0.{n}" for n, _ in ensemble.students[0].named_parameters() if not n.startswith("stem")
    }
    held = sum(len(group["params"]) for group in box.optimizer.param_groups)  # pyright: ignore[reportOptionalMemberAccess]
    assert held == len(trainable)


def test_wrapper_saves_and_loads_as_the_ensemble():
    _, ensemble = teacher_and_students()
    wrapper = StageWrapper(ensemble, stage=2, name=ensemble.names[1], sees_earlier=True)
    state = wrapper.state_dict()
    assert list(state) == list(ensemble.state_dict())
    fresh = MambaPKDEnsemble(STUDENTS, num_classes=3, in_chans=1, img_size=8)
    StageWrapper(fresh, stage=1, name=fresh.names[0], sees_earlier=True).load_state_dict(state)
    assert same(fresh, state) and int(fresh.num_active) == 2
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapper.nothing


def test_wrapper_refuses():
    _, ensemble = teacher_and_students()
    with pytest.raises(ValueError, match="stage 4 has no student: the ensemble has 3"):
        StageWrapper(ensemble, stage=4, name="mamba_pkd_s1", sees_earlier=False)
    with pytest.raises(ValueError, match="trains a mamba_pkd_ensemble, but the student is MambaPKD"):
        StageWrapper(ensemble.students[0], stage=1, name="mamba_pkd_s1", sees_earlier=False)
    with pytest.raises(ValueError, match="stage 1 is to train mamba_pkd_s7, but the ensemble's students are mamba_pkd"):
        StageWrapper(ensemble, stage=1, name="mamba_pkd_s7", sees_earlier=False)
