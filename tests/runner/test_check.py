"""The rehearsal of all stages leaves no trace in the box that trains."""

import pytest
import torch
from torch import nn

from timm_mamba_pkd.runner.box import build_box
from timm_mamba_pkd.runner.config import ConfigError, prepare

CPU = torch.device("cpu")


def hooks_of(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module._forward_hooks}


def test_late_stages_of_a_plain_config_freeze_nothing_yet(plain, build, write):
    first = build.stage(model={"forward_proc": "forward_batch_only", "forward_hook": {"output": ["norm"]}})
    late = {"forward_proc": "forward_batch_only", "frozen_modules": ["stem"], "forward_hook": {"output": ["head"]}}
    plain["train"] = {"log_freq": 1, "stage1": first, "stage2": build.stage(model=late)}
    job = prepare(write(plain), CPU)
    before = {name: tensor.clone() for name, tensor in job.student.state_dict().items()}
    box = build_box(job, CPU)
    assert box.stage_number == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert all(parameter.requires_grad for parameter in job.student.parameters())
    assert hooks_of(job.student) == {"norm"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.student.state_dict().items())


def test_progressive_box_starts_at_the_first_student(progressive, write):
    job = prepare(write(progressive), CPU)
    assert job.student.num_active == 2
    build_box(job, CPU)
    assert job.student.num_active == 1
    trainable = {name.split(".")[1] for name, p in job.student.named_parameters() if p.requires_grad}
    assert trainable == {"0"}
    assert not hooks_of(job.student)  # 'earlier' is hooked from stage 2 on


def test_nothing_is_written_between_rehearsed_stages(progressive, build, write, tmp_path):
    """torchdistill saves what `student.dst_ckpt` beside the stages names, whenever it advances."""
    sides = {"teacher": {"forward_proc": "forward_batch_only"}, "student": {"forward_proc": "forward_batch_only"}}
    stages = {f"stage{n}": build.stage(**sides) for n in (1, 2)}
    progressive["train"] = {"log_freq": 1, "student": {"dst_ckpt": str(tmp_path / "x" / "stage.pt")}, **stages}
    build_box(prepare(write(progressive), CPU), CPU)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["train_data_loader", "val_data_loader"])
def test_loaders_are_kept_from_stage_to_stage(name, plain, build, write):
    second = build.stage(model={"forward_proc": "forward_batch_only"})
    del second[name]
    first = build.stage(model={"forward_proc": "forward_batch_only"})
    plain["train"] = {"log_freq": 1, "stage1": first, "stage2": second}
    assert getattr(build_box(prepare(write(plain), CPU), CPU), name) is not None


def test_a_last_batch_of_one_image(progressive, write):
    """Batch norm cannot train on it where the grid has shrunk to 1x1; other grids and drop_last are fine."""
    loader = progressive["train"]["init"]["kwargs"]["train_data_loader"]
    job = prepare(write(progressive), CPU)
    size = len(job.datasets["fake/train"])
    loader["kwargs"] = {"batch_size": size - 1}
    with pytest.raises(ConfigError, match=r"train.stage1: the last batch of an epoch has one image.*drop_last: True"):
        build_box(prepare(write(progressive), CPU), CPU)
    loader["kwargs"]["drop_last"] = True
    build_box(prepare(write(progressive), CPU), CPU)
