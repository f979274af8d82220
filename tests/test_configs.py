"""Every shipped config: its header, and a whole run of it on a few images and with two students."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.distillation import build_model
from timm_mamba_pkd.models import save_checkpoint
from timm_mamba_pkd.models.weights import read_weights
from timm_mamba_pkd.report import read_csv

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "yaml_configs").rglob("*.yaml"))
FOLDERS = {"digits": 3, "mnist": 2, "cifar10": 8, "cifar100": 6, "imagenet": 6}


def each_config() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")


def test_there_are_configs():
    names = [path.parent.name for path in CONFIGS]
    assert {name: names.count(name) for name in names} == FOLDERS


@each_config()
def test_header_names_paper_cost_and_command(path):
    header = [line for line in path.read_text().split("\n\n")[0].splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert "https://arxiv.org/abs/" in text and "# Cost: " in text
    assert f"mamba-pkd train --config {path.relative_to(ROOT)}" in text


@each_config()
def test_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm_mamba_pkd.runner.results.measure_latency", lambda *args: 1.0)
    for plot in ("plot_accuracy_against_macs", "plot_curves"):
        monkeypatch.setattr(f"timm_mamba_pkd.report.folder.{plot}", lambda *args: None)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    monkeypatch.setattr("timm_mamba_pkd.datasets.Digits.__len__", lambda self: 9)
    DATA.get(path.parent.name, lambda root: None)(tmp_path / "resource" / "dataset")

    text = shrink(path)
    (tmp_path / "config.yaml").write_text(text)
    models = yaml.load(text, _PlainLoader)["models"]
    teacher = models.get("teacher_model")
    if teacher is not None and teacher.get("src_ckpt"):  # the result of another config
        save_checkpoint(build_model({**teacher, "src_ckpt": None}), teacher["src_ckpt"])

    assert main(["train", "--config", "config.yaml", "--device", "cpu", "--output", "run"]) == 0
    student = models.get("student_model", models.get("model"))
    weights = read_weights(student["dst_ckpt"])
    assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())
    steps = [int(tensor) for name, tensor in weights.items() if name.endswith("num_batches_tracked")]
    assert steps and min(steps) > 0  # each student was trained
    several = student["key"] == "mamba_pkd_ensemble"
    roles = ["student", "student", "ensemble", "ensemble"] if several else ["student"]
    assert [row.role for row in read_csv("run/results.csv")] == ["teacher"] * (teacher is not None) + roles


def shrink(path: Path) -> str:
    """The config with one epoch, two students, small batches and images, no worker processes, nothing to download."""
    text = path.read_text()
    for pattern, replacement in {
        r"num_epochs: \d+": "num_epochs: 1",
        r"batch_size: \d+": "batch_size: 4",
        r"num_workers: \d+": "num_workers: 0",
        r"pretrained: True": "pretrained: False",
        r"students: &students \[('\w+'), ('\w+').*\]": r"students: &students [\1, \2]",
        r"pin_memory: True": "pin_memory: False",
        r"\[224, 224\]": "[64, 64]",
    }.items():
        text = re.sub(pattern, replacement, text)
    return text


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def fake_mnist(root: Path) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 10), ("t10k", 4)):
        images, labels = noise(count, 28, 28), np.arange(count, dtype=np.uint8) % 10
        for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            (raw / f"{split}-{name}").write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def fake_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        _pickle(folder / name, {"data": noise(2, 3072), "labels": [0, 9]})
    _pickle(folder / "batches.meta", {"label_names": [f"class {i}" for i in range(10)]})


def fake_cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", 10), ("test", 2)):
        _pickle(folder / name, {"data": noise(count, 3072), "fine_labels": list(range(count))})
    _pickle(folder / "meta", {"fine_label_names": [f"class {i}" for i in range(100)]})


def fake_imagenet(root: Path) -> None:
    """Two classes of images of several sizes and modes."""
    for split, names in (("train", ("RGB.jpg", "L.jpg", "CMYK.jpg", "RGBA.png")), ("val", ("RGB.jpg", "L.png"))):
        for label in ("n01440764", "n01443537"):
            folder = root / "ilsvrc2012" / split / label
            folder.mkdir(parents=True)
            for i, name in enumerate(names):
                Image.fromarray(noise(90 + 45 * i, 130)).convert(name.split(".")[0]).save(folder / name)


def _pickle(path: Path, content: dict) -> None:
    path.write_bytes(pickle.dumps(content))


DATA: dict[str, Callable[[Path], None]] = {
    "mnist": fake_mnist,
    "cifar10": fake_cifar10,
    "cifar100": fake_cifar100,
    "imagenet": fake_imagenet,
}


class _PlainLoader(yaml.SafeLoader):
    """Reads a config without calling what it names."""


_PlainLoader.add_multi_constructor("!", lambda loader, suffix, node: None)
