"""Which keys a config may have: every mistake is named with its line, and upstream's own configs have none."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.schema import check_schema
from timm_mamba_pkd.runner.source import Source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def problems(write):
    """The problems of a config, without file and line."""

    def problems(config: Any) -> list[str]:
        path = config if isinstance(config, Path) else write(config)
        try:
            check_schema(Source.read(path))
        except ConfigError as error:
            return [line.split(": ", 1)[1] for line in str(error).splitlines()]
        return []

    return problems


@pytest.mark.parametrize("path", sorted((ROOT / "yaml_configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_right(path):
    assert check_schema(Source.read(path)) == []


def test_upstreams_image_classification_configs_are_right():
    folder = os.environ.get("TORCHDISTILL_REPO")
    if folder is None:
        pytest.skip("the configs are not in the pip package: set TORCHDISTILL_REPO to a checkout of torchdistill")
    paths = [
        path
        for kind in ("sample", "official")
        for data in ("ilsvrc2012", "cifar10", "cifar100")
        for path in (Path(folder) / "configs" / kind / data).rglob("*.yaml")
    ]
    assert len(paths) > 90
    warnings = {path.parent.name: check_schema(Source.read(path)) for path in paths}
    shared = {name: lines for name, lines in warnings.items() if lines}
    assert list(shared) == ["pad"]  # its second stage takes the first one's optimizer by alias
    assert "train.stage2.optimizer is that of train.stage1 by alias" in shared["pad"][0]


def test_legacy_configs_of_upstream_are_not(problems, plain):
    plain["models"]["model"] = {"name": "resnet18", "params": {"num_classes": 3}, "ckpt": "x.pt"}
    assert problems(plain) == [
        "models.model has no 'key'",
        "unknown key 'name' in models.model; known: key, kwargs, src_ckpt, dst_ckpt, repo_or_dir, quantized, sync_bn",
        "unknown key 'params' in models.model; known: key, kwargs, src_ckpt, dst_ckpt, repo_or_dir, quantized, sync_bn",
        "unknown key 'ckpt' in models.model; did you mean 'src_ckpt'?",
    ]


def test_the_tests_own_configs_are_right(problems, progressive, plain):
    assert problems(progressive) == problems(plain) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("datset", "unknown key 'datset' in the config; did you mean 'datasets'?"),
        ("models.student", "unknown key 'student' in models; did you mean 'student_model'?"),
        ("models.model.kwarg", "unknown key 'kwarg' in models.model; did you mean 'kwargs'?"),
        ("test.top_k", "unknown key 'top_k' in test; did you mean 'topk'?"),
        ("test.test_data_loader.batch_size", "in test.test_data_loader; it belongs in test.test_data_loader.kwargs"),
        ("test.test_data_loader.kwargs.batchsize", "in test.test_data_loader.kwargs; did you mean 'batch_size'?"),
        ("train.epochs", "unknown key 'epochs' in train; did you mean 'num_epochs'?"),
        ("train.sheduler", "unknown key 'sheduler' in train; did you mean 'scheduler'?"),
        ("train.stage_1", "unknown key 'stage_1' in train; "),
        ("train.optimizer.lr", "unknown key 'lr' in train.optimizer; known: key, kwargs"),
        ("train.model.require_grad", "unknown key 'require_grad' in train.model; did you mean 'requires_grad'?"),
        ("train.criterion.kwargs.sub_term", "in train.criterion.kwargs; did you mean 'sub_terms'?"),
        ("train.criterion.kwargs.sub_terms.ce.wieght", "in train.criterion.kwargs.sub_terms.ce; did you mean 'weight'"),
        ("train.criterion.kwargs.sub_terms.ce.criterion_wrapper.kwargs.inputs", "did you mean 'input'?"),
        ("train.criterion.kwargs.sub_terms.ce.criterion_wrapper.kwargs.target.use_label", "did you mean 'uses_label'?"),
        ("datasets.fake/train.init.kwarg", "in !import_call torchvision.datasets.FakeData.init; did you mean 'kwargs'"),
        ("datasets.fake/train.inti", "unknown key 'inti' in !import_call torchvision.datasets.FakeData; did you mean"),
        ("train.train_data_loader.sampler.class_or_func.packag", "in !import_get torch.utils.data.RandomSampler; did"),
    ],
)
def test_unknown_keys(path, message, problems, plain):
    section: Any = plain
    *parents, key = path.split(".")
    for parent in parents:
        section = section[parent]
    section[key] = {}
    (problem,) = problems(plain)
    assert message in problem
    del section[key]
    section[f"_{key}"] = {}  # upstream's way to define anchors
    assert problems(plain) == []


def test_every_unknown_key_is_said_with_its_line(plain, write, run, errors):
    plain["train"]["sheduler"] = {}
    plain["test"]["top_k"] = [1]
    assert run(plain, command="evaluate")[0] == 2
    text = write(plain).read_text().splitlines()
    expected = [next(n for n, line in enumerate(text, 1) if key in line) for key in ("sheduler", "top_k")]
    assert errors() == [
        f"line {expected[0]}: unknown key 'sheduler' in train; did you mean 'scheduler'?",
        f"line {expected[1]}: unknown key 'top_k' in test; did you mean 'topk'?",
    ]


def test_unknown_arguments_of_the_schedule(problems, progressive):
    arguments = progressive["train"]["init"]["kwargs"]
    arguments["num_epoch"] = arguments.pop("num_epochs")
    arguments["optimizer"]["kwarg"] = {}
    arguments["scheduler"] = {"key": "StepLR"}
    del arguments["criterion"]
    assert problems(progressive) == [
        "progressive has no 'criterion'",
        "unknown key 'kwarg' in progressive.optimizer; did you mean 'kwargs'?",
        "unknown key 'num_epoch' in progressive; did you mean 'num_epochs'?",
        "progressive.scheduler has no 'kwargs'",
    ]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.num_epochs", 0, "train.num_epochs must be an integer of at least 1, got 0"),
        ("train.num_epochs", 1.5, "train.num_epochs must be an integer of at least 1, got 1.5"),
        ("train.num_epochs", None, "train.num_epochs must be an integer of at least 1, got nothing"),
        ("train.log_freq", "often", "train.log_freq must be an integer of at least 1, got 'often'"),
        ("train.amp", 16, "train.amp must be True, False, bfloat16 or float16, got 16"),
        ("train.model.requires_grad", "False", "train.model.requires_grad must be True or False, got 'False'"),
        ("train.model.frozen_modules", "stem", "train.model.frozen_modules must be a list of module paths, got 'stem'"),
        ("train.model.forward_hook", {"output": "norm"}, "train.model.forward_hook.output must be a list of module pa"),
        ("train.train_data_loader.kwargs.batch_size", 0, "kwargs.batch_size must be an integer of at least 1, got 0"),
        ("train.train_data_loader.kwargs.num_workers", -1, "kwargs.num_workers must be an integer of at least 0, got"),
        ("train.train_data_loader", "fake/train", "train.train_data_loader must be a section, got 'fake/train'"),
        ("train.train_data_loader.sampler", None, "train.train_data_loader.sampler must be a section, got nothing"),
        ("train.optimizer.grad_accum_step", 0, "train.optimizer.grad_accum_step must be an integer of at least 1"),
        ("train.optimizer.kwargs.lr", "high", "train.optimizer.kwargs.lr must be a number, got 'high'"),
        ("train.scheduler", {"key": "StepLR", "kwargs": {"step_size": "x"}}, "kwargs.step_size must be a number, got"),
        ("train.optimizer.kwargs", None, "train.optimizer.kwargs must be a section, got nothing"),
        ("train.criterion.kwargs.sub_terms.ce.weight", "1", "sub_terms.ce.weight must be a number, got '1'"),
        ("models", None, "models must be a section, got nothing"),
        ("models.model", "resnet18", "models.model must be a section, got 'resnet18'"),
        ("train.optimizer.module_wise_kwargs", {}, "train.optimizer.module_wise_kwargs must be a list, got a mapping"),
        ("train.optimizer.module_wise_kwargs", [{}], "train.optimizer.module_wise_kwargs.1 has no 'module'"),
        ("datasets", [1], "datasets must be a section, got a list"),
    ],
)
def test_types_and_ranges(path, value, message, problems, plain):
    section: Any = plain
    *parents, key = path.split(".")
    for parent in parents:
        section = section[parent]
    section[key] = value
    assert any(message in problem for problem in problems(plain))


@pytest.mark.parametrize("number", ["0x10", "0b11", "1:30", "1_000", "017"])
def test_all_integers_of_yaml_are_integers(number, problems, plain, write):
    plain["train"]["num_epochs"] = 12345
    path = write(plain)
    path.write_text(path.read_text().replace("12345", number))
    assert problems(path) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("datasets", "there is no section 'datasets'"),
        ("models", "there is no section 'models'"),
        ("train", "there is no section 'train'"),
        ("test", "there is no section 'test'"),
        ("test.test_data_loader", "test has no 'test_data_loader'"),
        ("test.test_data_loader.dataset_id", "test.test_data_loader has no 'dataset_id'"),
        ("models.model.key", "models.model has no 'key'"),
        ("train.num_epochs", "train has no 'num_epochs'"),
        ("train.train_data_loader", "train has no 'train_data_loader'"),
        ("train.val_data_loader", "train has no 'val_data_loader'"),
        ("train.criterion", "train has no 'criterion'"),
        ("train.optimizer.key", "train.optimizer has no 'key'"),
        ("train.criterion.kwargs.sub_terms.ce.weight", "train.criterion.kwargs.sub_terms.ce has no 'weight'"),
    ],
)
def test_missing_keys(path, message, problems, plain):
    section: Any = plain
    *parents, key = path.split(".")
    for parent in parents:
        section = section[parent]
    del section[key]
    assert problems(plain) == [message]


def test_stages_are_numbered_from_1(problems, plain, build):
    stage = build.stage(model={"forward_proc": "forward_batch_only"})
    plain["train"] = {"log_freq": 1, "stage1": stage, "stage3": stage}
    assert problems(plain) == ["train has no 'stage2', but 2 stages"]
    plain["train"] = {"log_freq": 1, "stage1": stage, "stage2": stage, "optimizer": {}}
    assert problems(plain)[0].startswith("unknown key 'optimizer' in train; ")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({}, "train.stage1.teacher would be trained, which is torchdistill's default: set requires_grad: False (or"),
        ({"frozen_modules": []}, "train.stage1.teacher would be trained"),
        ({"frozen_modules": ["conv1"]}, None),
        ({"requires_grad": False}, None),
        ({"requires_grad": True}, None),
        (None, "train.stage1 has no section 'teacher', so it would train the teacher: add teacher: {forward_proc: "),
    ],
)
def test_a_teacher_that_would_be_trained_by_accident(teacher, message, problems, progressive, build):
    student = {"forward_proc": "forward_batch_only"}
    stage = build.stage(student=student)
    if teacher is not None:
        stage["teacher"] = {"forward_proc": "forward_batch_only", **teacher}
    progressive["train"] = {"log_freq": 1, "stage1": stage}
    assert [problem[: len(message or "")] for problem in problems(progressive)] == ([message] if message else [])
    del progressive["models"]["teacher_model"]
    assert problems(progressive) == []


def test_an_optimizer_shared_by_alias(plain, build, tmp_path):
    model = {"forward_proc": "forward_batch_only"}
    optimizer = {"key": "SGD", "kwargs": {"lr": 0.1}}
    stage = build.stage(model=model, optimizer=optimizer)
    plain["train"] = {"log_freq": 1, "stage1": stage, "stage2": {**build.stage(model=model), "optimizer": optimizer}}
    plain["datasets"] = {}  # without their tags they would be no data sets
    text = yaml.safe_dump(_plain(plain), sort_keys=False)
    path = tmp_path / "shared.yaml"
    path.write_text(text)
    line = next(n for n, line in enumerate(text.splitlines(), 1) if line.strip() == "optimizer: *id001")
    assert check_schema(Source.read(path)) == [
        f"config {path}, line {line}: train.stage2.optimizer is that of train.stage1 by alias: under torchdistill's "
        "-adjust_lr its learning rate is multiplied in each of them; write it out twice"
    ]


def _plain(value: Any) -> Any:
    """Without tags, and with nothing but the optimizer shared."""
    if isinstance(value, dict) and value.get("key") == "SGD":
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def test_nothing_is_executed(tmp_path, run):
    """A config with a mistake is refused before anything that it names is imported."""
    path = tmp_path / "config.yaml"
    victim = tmp_path / "victim"
    path.write_text(f"oops: 1\ndatasets: !import_call {{key: os.mkdir, init: {{args: ['{victim}']}}}}\n")
    assert run(path, command="check")[0] == 2
    assert not victim.exists()
