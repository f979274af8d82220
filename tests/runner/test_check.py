"""``mamba-pkd check``: every stage is tried with one batch, nothing is left of it, and the rest is estimated."""

import logging
import random
import re
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from timm_mamba_pkd.distillation import RULES
from timm_mamba_pkd.runner import check as checking
from timm_mamba_pkd.runner.box import build_box
from timm_mamba_pkd.runner.check import StageEstimate, check
from timm_mamba_pkd.runner.config import prepare
from timm_mamba_pkd.runner.errors import ConfigError

CPU = torch.device("cpu")
SIDE = {"forward_proc": "forward_batch_only"}


def hooks_of(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module._forward_hooks}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def random_numbers() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.mark.parametrize("config", ["progressive", "plain"])
def test_nothing_is_left_of_it(config, request, write):
    job = prepare(write(request.getfixturevalue(config)), CPU)
    models = [model for model in (job.student, job.teacher) if model is not None]
    before = [state_of(model) for model in models]
    text = repr(job.config)
    level = logging.getLogger("torchdistill").level
    seed()
    check(job, CPU)
    numbers = random_numbers()
    seed()
    assert random_numbers() == numbers
    for model, state in zip(models, before, strict=True):
        after = state_of(model)
        assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert not hooks_of(model)
    assert repr(job.config) == text
    assert logging.getLogger("torchdistill").level == level


def test_training_is_the_same_without_it(progressive, run, monkeypatch):
    kwargs = progressive["train"]["init"]["kwargs"]
    kwargs["num_epochs"] = 2
    _, checked = run(progressive)
    estimate = StageEstimate("mamba_pkd_s1", 2, 3, 0.1, cache_bytes=0, cache_dir=None)
    monkeypatch.setattr("timm_mamba_pkd.runner.commands.check", lambda *args, **kwargs: [estimate, estimate])
    _, unchecked = run(progressive, output="unchecked")
    weights = [load_file(folder / "weights" / "ensemble.safetensors") for folder in (checked, unchecked)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_late_stages_of_a_plain_config_freeze_nothing_yet(plain, build, write):
    first = build.stage(model={**SIDE, "forward_hook": {"output": ["norm"]}})
    late = {**SIDE, "frozen_modules": ["stem"], "forward_hook": {"output": ["head"]}}
    plain["train"] = {"log_freq": 1, "stage1": first, "stage2": build.stage(model=late)}
    job = prepare(write(plain), CPU)
    before = state_of(job.student)
    check(job, CPU)
    box = build_box(job, CPU)
    assert box.stage_number == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert all(parameter.requires_grad for parameter in job.student.parameters())
    assert hooks_of(job.student) == {"norm"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(job.student).items())


def test_progressive_box_starts_at_the_first_student(progressive, write):
    job = prepare(write(progressive), CPU)
    check(job, CPU)
    build_box(job, CPU)
    assert job.student.num_active == 1
    trainable = {name.split(".")[1] for name, p in job.student.named_parameters() if p.requires_grad}
    assert trainable == {"0"}
    assert not hooks_of(job.student)


def test_nothing_is_written_between_rehearsed_stages(progressive, build, write, tmp_path):
    """torchdistill saves what `student.dst_ckpt` beside the stages names, whenever it advances."""
    sides = {"teacher": {**SIDE, "requires_grad": False}, "student": SIDE}
    stages = {f"stage{n}": build.stage(**sides) for n in (1, 2)}
    progressive["train"] = {"log_freq": 1, "student": {"dst_ckpt": str(tmp_path / "x" / "stage.pt")}, **stages}
    check(prepare(write(progressive), CPU), CPU)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["train_data_loader", "val_data_loader"])
def test_loaders_are_kept_from_stage_to_stage(name, plain, build, write):
    second = build.stage(model=SIDE)
    del second[name]
    plain["train"] = {"log_freq": 1, "stage1": build.stage(model=SIDE), "stage2": second}
    job = prepare(write(plain), CPU)
    assert len(check(job, CPU)) == 2
    assert getattr(build_box(job, CPU), name) is not None


def test_a_last_batch_of_one_image(progressive, write):
    """Batch norm cannot train on it where the grid has shrunk to 1x1; other grids and drop_last are fine."""
    loader = progressive["train"]["init"]["kwargs"]["train_data_loader"]
    job = prepare(write(progressive), CPU)
    loader["kwargs"] = {"batch_size": len(job.datasets["fake/train"]) - 1}
    with pytest.raises(ConfigError, match=r"line \d+: train.stage1: the last batch of an epoch has one image.*drop_l"):
        check(prepare(write(progressive), CPU), CPU)
    loader["kwargs"]["drop_last"] = True
    check(prepare(write(progressive), CPU), CPU)


def test_a_last_batch_of_one_image_in_a_process(progressive, write, monkeypatch):
    """Three left for two processes; with synchronized batch norms they are three."""
    monkeypatch.setattr("timm_mamba_pkd.runner.check.world", lambda: 2)
    progressive["train"]["init"]["kwargs"]["train_data_loader"]["kwargs"] = {"batch_size": 7}
    progressive["datasets"]["fake/train"]["init"]["kwargs"]["size"] = 17
    job = prepare(write(progressive), CPU)
    with pytest.raises(ConfigError, match="the last batch of an epoch has one image in a process, which cannot"):
        check(job, CPU)
    check(job, CPU, sync_bn=True)


def test_no_worker_processes_are_started(plain, write, monkeypatch):
    plain["train"]["train_data_loader"]["kwargs"]["num_workers"] = 2
    job = prepare(write(plain), CPU)
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", lambda *args: pytest.fail("a process"))
    check(job, CPU)


@pytest.mark.parametrize(
    ("key", "kwargs", "message"),
    [
        (
            "Linear4CRD",
            {"input_module_path": "head", "linear_kwargs": {"in_features": 3, "out_features": 3}, "powr": 2},
            "Linear4CRD has no parameter 'powr'; it has input_module_path, linear_kwargs, power",
        ),
        ("Linear4CDR", {}, "unknown auxiliary model wrapper 'Linear4CDR'; known: .*Linear4CRD"),
    ],
)
def test_parameters_that_a_wrapper_passes_over(key, kwargs, message, plain, write):
    plain["train"]["model"] = {**SIDE, "auxiliary_model_wrapper": {"key": key, "kwargs": kwargs}}
    with pytest.raises(ConfigError, match=message):
        check(prepare(write(plain), CPU), CPU)


def test_amp_and_channels_last(progressive, run, capsys):
    assert run(progressive, "--amp", "--channels-last", command="check")[0] == 0
    assert capsys.readouterr().out.endswith("config OK\n")


def test_command(progressive, run, capsys, tmp_path):
    progressive["train"]["init"]["kwargs"]["num_epochs"] = 7
    code, folder = run(progressive, command="check")
    assert code == 0 and not folder.exists()
    expected = rf"""{tmp_path}/config\.yaml
  stage 1: mamba_pkd_s1, 7 epochs of 3 steps of [\d.]+ ms, about .*
  stage 2: mamba_pkd_s2, 7 epochs of 3 steps of [\d.]+ ms, about .*
  time: about .* on cpu for the training steps alone
  disk: about .*B in {folder}
config OK
"""
    out = capsys.readouterr().out
    assert re.fullmatch(expected, out), out


def test_plain_command(plain, run, capsys):
    assert run(plain, command="check")[0] == 0
    assert "  stage 1: mamba_pkd_timm_model, 1 epochs of 3 steps of " in capsys.readouterr().out


def test_slow_steps_are_not_repeated(plain, write, monkeypatch):
    steps = []
    monkeypatch.setattr(checking, "_try_step", lambda *args: steps.append(0) or (3.0, 1.0))
    (stage,) = check(prepare(write(plain), CPU), CPU)
    assert len(steps) == 1 and (stage.student, stage.epochs, stage.steps, stage.seconds_per_step) == (None, 1, 3, 3.0)
    assert stage.seconds == 9.0 and (stage.cache_bytes, stage.cache_dir) == (0, None)
    steps.clear()
    monkeypatch.setattr(checking, "_try_step", lambda *args: steps.append(0) or (2.0 - len(steps), 1.0))
    assert check(prepare(write(plain), CPU), CPU)[0].seconds_per_step == 0.0
    assert len(steps) == 2


def test_the_warning_of_a_shared_optimizer_is_logged(plain, build, run, tmp_path, caplog):
    """Under torchdistill's script, which can adjust the learning rate to several processes, it matters."""
    stage = build.stage(model=SIDE)
    plain["train"] = {"log_freq": 1, "stage1": stage, "stage2": build.stage(model=SIDE)}
    assert run(plain, command="check")[0] == 0
    path = tmp_path / "config.yaml"
    text = path.read_text()
    optimizer = "    optimizer:\n      key: mamba_pkd_adamw\n      kwargs:\n        lr: 0.01\n"
    assert text.count(optimizer) == 2
    first, second, third = text.split(optimizer)
    shared = optimizer.replace("optimizer:", "optimizer: &shared", 1)
    path.write_text(first + shared + second + "    optimizer: *shared\n" + third)
    with caplog.at_level(logging.WARNING):
        assert run(path, command="check")[0] == 0
    assert "train.stage2.optimizer is that of train.stage1 by alias" in caplog.text


@pytest.mark.parametrize("rule", ["independent", "residual", "bdistil", "assistant"])
def test_every_rule_and_the_cache(rule, progressive, write, tmp_path):
    """No cache is opened, but its size is counted where the teacher's or an earlier student's logits are kept."""
    arguments = progressive["train"]["init"]["kwargs"]
    arguments["rule"] = rule
    plain = check(prepare(write(progressive), CPU), CPU)
    assert [stage.cache_bytes for stage in plain] == [0, 0]
    arguments["cache_dir"] = str(tmp_path / "cache")
    first, second = check(prepare(write(progressive), CPU), CPU)
    row = 3 * 2 + 4  # three float16 logits and a checksum
    assert first.cache_bytes == 24 * row
    assert second.cache_bytes == (24 * row if RULES[rule].sees_earlier else 0)
    assert not (tmp_path / "cache").exists()


def test_unusable_cache_folder(progressive, run, errors, tmp_path):
    (tmp_path / "file").touch()
    progressive["train"]["init"]["kwargs"]["cache_dir"] = str(tmp_path / "file" / "cache")
    for command in ("check", "train"):
        assert run(progressive, command=command)[0] == 2
        assert errors()[0].endswith(f"cache_dir {tmp_path}/file/cache cannot be written: {tmp_path}/file is a file")


def test_a_cache_of_something_else_ends_the_run_in_one_line(progressive, run, errors, tmp_path):
    progressive["models"]["teacher_model"]["src_ckpt"] = str(tmp_path / "teacher.pt")
    teacher = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    progressive["train"]["init"]["kwargs"]["cache_dir"] = str(tmp_path / "cache")
    assert run(progressive)[0] == 0
    (folder,) = (tmp_path / "cache").glob("teacher-*")
    meta = folder / "meta.json"
    meta.write_text(meta.read_text().replace('"seed": 42', '"seed": 43'))
    assert run(progressive, output="again")[0] == 2
    (line,) = errors()
    assert line == (
        f"cache {folder} was made from another seed: delete the folder, or choose another cache_dir; "
        "there is no checkpoint yet"
    )


@pytest.mark.parametrize("flags", [(), ("--model-ema",)])
def test_estimated_checkpoints_are_those_of_the_run(flags, progressive, run, write):
    """With AdamW and accumulated gradients: what is reckoned beforehand is what the file takes."""
    kwargs = progressive["train"]["init"]["kwargs"]
    kwargs["num_epochs"] = 3
    kwargs["optimizer"]["grad_accum_step"] = 2
    kwargs["train_data_loader"]["kwargs"]["batch_size"] = 24  # the last checkpoint comes between two gradients
    stage = check(prepare(write(progressive), CPU), CPU)[-1]
    code, folder = run(progressive, *flags)
    assert code == 0
    (path,) = (folder / "checkpoints").glob("stage2_epoch0006*")
    with zipfile.ZipFile(path) as file:
        tensors = sum(entry.file_size for entry in file.infolist() if "/data/" in entry.filename)
    assert tensors == pytest.approx(stage.checkpoint_bytes + bool(flags) * stage.trained_bytes, rel=0.02)
