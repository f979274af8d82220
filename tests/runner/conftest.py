"""Tiny torchdistill configs, as dictionaries that tests change and then write as YAML."""

import copy
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.datasets import FakeData

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.models import save_weights


class Call(dict):
    """``!import_call``"""


class Get(dict):
    """``!import_get``"""


class Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


Dumper.add_representer(Call, lambda dumper, data: dumper.represent_mapping("!import_call", data))
Dumper.add_representer(Get, lambda dumper, data: dumper.represent_mapping("!import_get", data))


def call(key: str, **kwargs: Any) -> Call:
    return Call(key=key, init={"kwargs": kwargs})


def fake_images(size: int, offset: int, side: int = 8, classes: int = 3) -> Call:
    """Noise of 1 channel with labels of `classes` classes, the same in every run."""
    to_tensor = call("torchvision.transforms.ToTensor")
    return call(
        "torchvision.datasets.FakeData",
        size=size, image_size=[1, side, side], num_classes=classes, random_offset=offset, transform=to_tensor,
    )  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def remembered_noise() -> Iterator[None]:
    """FakeData seeds the generators of all devices for each image, which takes long: once for an image is enough."""
    make = FakeData.__getitem__

    @functools.cache
    def made(index: int, size: Any, classes: int, offset: int) -> Any:
        return make(FakeData(index + 1, size, classes, random_offset=offset), index)

    def remember(self: FakeData, index: int) -> tuple[Any, Any]:
        if index >= len(self):
            raise IndexError(index)
        image, label = made(index, tuple(self.image_size), self.num_classes, self.random_offset)
        image = image if self.transform is None else self.transform(image)
        return image, label if self.target_transform is None else self.target_transform(label)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeData, "__getitem__", remember)
        yield


def loader(dataset_id: str, sampler: str = "SequentialSampler", batch_size: int = 8) -> dict[str, Any]:
    sampler_config = {"class_or_func": Get(key=f"torch.utils.data.{sampler}"), "kwargs": None}
    return {"dataset_id": dataset_id, "sampler": sampler_config, "kwargs": {"batch_size": batch_size}}


def cross_entropy(weight: float) -> dict[str, Any]:
    path = {"is_from_teacher": False, "module_path": ".", "io": "output"}
    return {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
        "criterion_wrapper": {
            "key": "SimpleLossWrapper",
            "kwargs": {"input": path, "target": {"uses_label": True}},
        },
        "weight": weight,
    }


def stage(**changes: Any) -> dict[str, Any]:
    """What every stage needs."""
    return {
        "num_epochs": 1,
        "train_data_loader": loader("fake/train", "RandomSampler"),
        "val_data_loader": loader("fake/val"),
        "optimizer": {"key": "mamba_pkd_adamw", "kwargs": {"lr": 0.01}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"ce": cross_entropy(0.5)}}},
        **changes,
    }


def progressive_config() -> dict[str, Any]:
    """Students s1 and s2 learn from timm's test_resnet; train.init.kwargs are the schedule's arguments."""
    students = ["mamba_pkd_s1", "mamba_pkd_s2"]
    sizes: dict[str, Any] = {"num_classes": 3, "in_chans": 1}
    return {
        "dependencies": [{"name": "timm_mamba_pkd"}],
        "datasets": {
            "fake/train": fake_images(24, offset=0),
            "fake/val": fake_images(12, offset=100),
            "fake/test": fake_images(21, offset=200),  # the last batch is smaller
        },
        "models": {
            "teacher_model": {"key": "mamba_pkd_timm_model", "kwargs": {"model_name": "test_resnet", **sizes}},
            "student_model": {"key": "mamba_pkd_ensemble", "kwargs": {"students": students, "img_size": 8, **sizes}},
        },
        "train": call("timm_mamba_pkd.progressive", students=students, **stage()),
        "test": {"test_data_loader": loader("fake/test")},
    }


def plain_config() -> dict[str, Any]:
    """One student, no teacher: torchdistill's TrainingBox, with the keys of upstream's configs."""
    config = progressive_config()
    kwargs = {"model_name": "mamba_pkd_s1", "num_classes": 3, "in_chans": 1, "img_size": 8}
    config["models"] = {"model": {"key": "mamba_pkd_timm_model", "kwargs": kwargs}}
    config["train"] = stage(log_freq=1000, model={"forward_proc": "forward_batch_only"})
    return config


@pytest.fixture
def progressive() -> dict[str, Any]:
    return progressive_config()


@pytest.fixture
def plain() -> dict[str, Any]:
    return plain_config()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((folder / "weights").iterdir()):
        found |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    return found


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    """Whether two run folders hold the same weights, bit for bit, and the same metrics but for times."""

    def assert_same_run(folder: Path, other: Path) -> None:
        one, two = weights_of(folder), weights_of(other)
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, two[name]), name
        timeless = [
            [{k: v for k, v in json.loads(line).items() if k not in ("img_per_s", "seconds")} for line in lines]
            for lines in ((f / "metrics.jsonl").read_text().splitlines() for f in (folder, other))
        ]
        assert timeless[0] == timeless[1]

    return assert_same_run


@pytest.fixture(scope="session")
def zygote() -> Iterator[subprocess.Popen]:
    """What `zygote.py` is."""
    script = Path(__file__).with_name("zygote.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def rich(progressive, build, tmp_path, monkeypatch) -> dict[str, Any]:
    """Two stages of two epochs that use everything with a state: dropout, momentum, a schedule per step, a rule with
    weights, fitted combination, random augmentation, replayed views, a cache, accumulated gradients."""
    monkeypatch.chdir(tmp_path)
    flip = build.call("torchvision.transforms.RandomErasing", p=0.5)
    crop = build.call("torchvision.transforms.RandomCrop", size=8, padding=1)
    to_tensor = build.call("torchvision.transforms.ToTensor")
    transform = build.call("torchvision.transforms.Compose", transforms=[crop, to_tensor, flip])
    progressive["datasets"]["fake/train"]["init"]["kwargs"]["transform"] = transform
    progressive["models"]["student_model"]["kwargs"] |= {"drop_path_rate": 0.2, "combination": "per_student"}
    progressive["train"]["init"]["kwargs"] |= {
        "num_epochs": 2,
        "rule": {"key": "bdistil", "kwargs": {"max_retries": 1, "slack": 0.0}},
        "views": {"num_views": 2, "mixup_alpha": 0.2, "num_classes": 3},
        "cache_dir": "cache",  # each folder of a test has its own
        "optimizer": {"key": "mamba_pkd_adamw", "kwargs": {"lr": 0.01}, "grad_accum_step": 2},
        "scheduler": {"key": "OneCycleLR", "kwargs": {"max_lr": 0.01, "total_steps": 6}, "scheduling_step": 2},
    }
    return progressive


def weights(path: Path, name: str, seed: int = 0, **kwargs: Any) -> Any:
    """A model of timm whose predictions differ from image to image, and the file of its weights."""
    torch.manual_seed(seed)
    model: Any = timm.create_model(name, **{"num_classes": 3, "in_chans": 1, **kwargs})
    nn.init.normal_(model.get_classifier().weight)
    save_weights(model, path)
    return model.eval()


@pytest.fixture
def build() -> Any:
    """The helpers above, for tests that need more: `build.stage()`, `build.call(...)`."""
    return SimpleNamespace(call=call, fake_images=fake_images, loader=loader, stage=stage, weights=weights)


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    def write(config: Any, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.dump(copy.deepcopy(config), Dumper=Dumper, sort_keys=False))
        return path

    return write


@pytest.fixture
def errors(capsys, tmp_path) -> Callable[[], list[str]]:
    """What the command said on stderr, line by line; where a line names `write`'s config, only 'line N: ...' of it."""

    def errors() -> list[str]:
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("mamba-pkd: error: ") for line in lines)
        config = f"config {tmp_path / 'config.yaml'}, "
        return [line.removeprefix("mamba-pkd: error: ").removeprefix(config) for line in lines]

    return errors


@pytest.fixture
def run(tmp_path, write, monkeypatch) -> Callable[..., tuple[int, Path]]:
    """Run a subcommand of mamba-pkd on a config, on the CPU; returns the exit code and the run's folder.

    Latency and plots, which take most of the time of such small runs, are left out.
    """
    monkeypatch.setattr("timm_mamba_pkd.runner.results.measure_latency", lambda *args: 1.0)
    for plot in ("plot_accuracy_against_macs", "plot_curves"):
        monkeypatch.setattr(f"timm_mamba_pkd.report.folder.{plot}", lambda *args: None)

    def run(config: Any, *flags: str, command: str = "train", output: str = "run") -> tuple[int, Path]:
        path = config if isinstance(config, Path) else write(config)
        folder = tmp_path / output
        return main([command, "--config", str(path), "--device", "cpu", "--output", str(folder), *flags]), folder

    return run


@pytest.fixture(scope="session")
def kept(tmp_path_factory) -> Path:
    """Where the run of `taught` is kept from test to test."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def taught(progressive, run, build, kept, tmp_path, capsys, monkeypatch) -> Path:
    """The folder of a run: students s1 and s2 of a teacher with weights."""
    monkeypatch.chdir(tmp_path)
    progressive["models"]["teacher_model"]["src_ckpt"] = "teacher.safetensors"
    if not (kept / "run").exists():
        build.weights(kept / "teacher.safetensors", "test_resnet")
        shutil.copy(kept / "teacher.safetensors", tmp_path)
        assert run(progressive)[0] == 0
        shutil.copytree("run", kept / "run")
        shutil.rmtree("run")
        capsys.readouterr()
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    return Path("run")


@pytest.fixture
def images(tmp_path) -> Callable[..., Path]:
    """A folder of noisy grey images, a folder for each class."""

    def images(*classes: str, size: int = 8, count: int = 4) -> Path:
        torch.manual_seed(1)
        for label in classes:
            folder = tmp_path / "images" / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (size, size), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        return tmp_path / "images"

    return images
