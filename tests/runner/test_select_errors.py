"""``mamba-pkd select``: what it cannot do is one line, before anything is measured."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from timm_mamba_pkd.cli import main


def select(*words: Any) -> int:
    return main(["select", *map(str, words), "--device", "cpu"])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr: one line."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("mamba-pkd: error: ")
    return line


@pytest.fixture
def no_compute(monkeypatch):
    def fail(*args: Any) -> None:
        raise AssertionError("something is measured")

    for name in ("_predict", "measure_latency", "count_macs", "measure_peak_memory"):
        monkeypatch.setattr(f"timm_mamba_pkd.runner.select.{name}", fail)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the pool is empty: name folders of runs, or timm models by --models"),
        (["run", "--min-accuracy", "101"], "--min-accuracy 101 contradicts itself"),
        (["run", "--max-macs", "-1"], "--max-macs -1 contradicts itself"),
        (["run", "--max-latency", "nan"], "--max-latency nan contradicts itself"),
        (["run", "--min-disagreement", "-1"], "--min-disagreement -1 is not from 0 to 100"),
        (["images"], "images is not the folder of a run (no config.yaml in it)"),
        (["nowhere"], "nowhere is not the folder of a run"),
        (["run", "--models", "mamba_pkd_s9=x.safetensors"], "unknown model 'mamba_pkd_s9'"),
        (["run", "--models", "mamba_pkd_s1"], "--models mamba_pkd_s1 has no weights: write mamba_pkd_s1=CHECKPOINT"),
        (["run", "--models", "mamba_pkd_ensemble=nowhere.pt"], "weights file nowhere.pt does not exist"),
        (
            ["run", "--models", "mamba_pkd_ensemble=both.safetensors"],
            "; if its students are others than s1 to s7, name ",
        ),
        (["run", "--models", "mamba_pkd_s1=nowhere.pt"], "weights file nowhere.pt does not exist"),
        (["run", "--models", "local-dir:nowhere"], "model local-dir:nowhere cannot be created"),
        (["run", "--models", "mamba_pkd_s1=rgb.safetensors"], "mamba_pkd_s1 cannot take images of 1x8x8"),
        (["run", "--img-size", "8"], "--img-size is that of the run in run: leave it out"),
        (["run", "--interpolation", "box"], "--interpolation is that of the run in run: leave it out"),
        (["--models", "mamba_pkd_s1=two.safetensors"], "there are no labelled samples: name a folder"),
        (["--models", "mamba_pkd_s1=two.safetensors", "--data-root", "images"], "images has 3 classes, mamba_pkd_s1 2"),
        (["--models", "mamba_pkd_s1=two.safetensors", "--data-root", "images/a"], "images/a has no labels"),
        (["--models", "mamba_pkd_s1=two.safetensors", "--data-root", "empty"], "--data-root empty"),
        (["--models", "mamba_pkd_s1=two.safetensors", "--data-root", "nowhere"], "--data-root nowhere is not there"),
        (["run", "--data-root", "images/a"], "images/a has no labels: it must hold a folder of images per class"),
    ],
)
def test_bad_input(words, message, taught, images, no_compute, capsys, build):
    images("a", "b", "c")
    Path("empty").mkdir()
    build.weights(Path("two.safetensors"), "mamba_pkd_s1", num_classes=2)
    build.weights(Path("rgb.safetensors"), "mamba_pkd_s1", in_chans=3)
    shutil.copy("run/weights/ensemble.safetensors", "both.safetensors")
    before = sorted(Path().rglob("*"))
    assert select(*words) == 2
    assert message in error(capsys)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("test", "'fake/test', is the test set, on which nothing may be fitted or chosen: name labelled images by"),
        ("overlap", "'fake/val', shares 4 of its 12 samples with the test set, 'fake/test', on which nothing may be"),
        ("nameless", "names no validation split: name labelled images by --data-root"),
        ("empty", "is empty: name labelled images by --data-root"),
        ("unlabelled", "are no labelled images"),
        ("failing", "sample 0 of data set 'fake/val' cannot be read (TypeError"),
        ("gone", "cannot be read"),
    ],
)
def test_a_validation_split_that_cannot_serve(change, message, progressive, taught, build, write, capsys, no_compute):
    if change == "test":
        progressive["train"]["init"]["kwargs"]["val_data_loader"] = build.loader("fake/test")
    elif change == "overlap":
        for name, first in (("val", 0), ("test", 8)):
            part = build.call("torch.utils.data.Subset", dataset=build.fake_images(30, offset=0))
            part["init"]["kwargs"]["indices"] = list(range(first, first + 12))
            progressive["datasets"][f"fake/{name}"] = part
    elif change == "nameless":
        progressive["train"]["init"]["kwargs"]["val_data_loader"] = build.loader("fake/other")
    elif change == "empty":
        progressive["datasets"]["fake/val"] = build.fake_images(0, offset=100)
    elif change in ("unlabelled", "failing"):
        key, argument = ("operator.attrgetter", "__doc__") if change == "unlabelled" else ("operator.itemgetter", 0)
        transform = build.call(key)
        transform["init"] = {"args": [argument]}
        progressive["datasets"]["fake/val"]["init"]["kwargs"]["target_transform"] = transform
    else:
        progressive["datasets"]["fake/val"]["init"]["kwargs"]["size"] = "many"
        progressive["datasets"]["fake/test"] = build.call("torchvision.datasets.MNIST", root="nowhere")
    shutil.copy(write(progressive), taught / "config.yaml")
    assert select(taught) == 2
    assert message in error(capsys)


def test_labels_that_a_model_lacks(taught, capsys, build):
    """Of data that do not say how many classes they have."""
    build.weights(Path("two.safetensors"), "mamba_pkd_s1", num_classes=2)
    assert select(taught, "--models", "mamba_pkd_s1=two.safetensors") == 2
    assert "fake/val of run/config.yaml has a label 2, mamba_pkd_s1 #2 has 2 classes" in error(capsys)


def test_images_that_cannot_be_read(taught, images, capsys):
    folder = images("a", "b", "c")
    (folder / "a" / "1.png").write_bytes(b"no image")
    assert select(taught, "--data-root", folder, "-j", "0") == 2
    assert "1 of 12 images cannot be read, so there is no result" in error(capsys)
    assert not (taught / "select").exists()
