"""``mamba-pkd export`` of a model whose data, teacher or first weights are gone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.deploy import FORMATS
from timm_mamba_pkd.distillation import build_model
from timm_mamba_pkd.models import save_weights

NEEDS_ONNX = pytest.mark.skipif(bool(FORMATS["onnx"].missing()), reason="ONNX's packages are not installed")


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch):
    monkeypatch.setattr("timm_mamba_pkd.runner.export.median_time", lambda run, repeats: 1.0)


@pytest.fixture
def gone(progressive, run, build, tmp_path, capsys, monkeypatch) -> Callable[..., Path]:
    """A run whose teacher and student were made of checkpoints and whose data were files, all of which are gone."""
    transform = progressive["datasets"]["fake/test"]["init"]["kwargs"]["transform"]
    normalize = build.call("torchvision.transforms.Normalize", mean=[0.25], std=[0.75])
    progressive["datasets"]["fake/test"]["init"]["kwargs"]["transform"] = build.call(
        "torchvision.transforms.Compose", transforms=[transform, normalize]
    )
    for role in ("teacher_model", "student_model"):
        entry = progressive["models"][role]
        entry["src_ckpt"] = str(tmp_path / f"{role}.safetensors")
        save_weights(build_model({**entry, "src_ckpt": None}), entry["src_ckpt"])
    code, folder = run(progressive)
    assert code == 0
    for role in ("teacher_model", "student_model"):
        Path(progressive["models"][role]["src_ckpt"]).unlink()
    capsys.readouterr()

    def gone(data: bool) -> Path:
        if data:
            monkeypatch.setattr("torchvision.datasets.FakeData.__init__", no_disk)
        return folder

    return gone


def no_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError("the disk is gone")


@pytest.mark.parametrize("data", [False, True])
def test_run_whose_teacher_and_data_are_gone(gone, data, tmp_path, capsys, caplog):
    folder = gone(data)
    assert main(["export", str(folder), "--format", "hf"]) == 0
    out = capsys.readouterr().out
    assert "(random)" in out and ("(test images)" in out) == (not data)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("timm_mamba_pkd")]
    config = f"{folder}/config.yaml"
    warning = (
        f"The data cannot be read (config {config}, line 4: OSError: the disk is gone): what is written is compared on "
        "random images only. Their size, 1x8x8, and the 3 classes are those of the model mamba_pkd_ensemble of "
    )
    assert said[-1:] == ([warning + config] if data else [])
    loaded: Any = timm.create_model(f"local-dir:{folder}/export/ensemble_2", pretrained=True).eval()
    assert (loaded.default_cfg["mean"], loaded.default_cfg["std"]) == ([0.25], [0.75])
    trained_weights = load_file(folder / "weights" / "ensemble.safetensors")
    torch.testing.assert_close(dict(loaded.state_dict()), trained_weights, rtol=0, atol=0)
    card = (folder / "export" / "ensemble_2" / "README.md").read_text()
    assert ("- `fake/test`\n" if data else "- `fake/test`: 21 images of") in card

    student = timm.create_model("mamba_pkd_s1", num_classes=3, in_chans=1, img_size=8)
    save_weights(student, tmp_path / "weights.safetensors")
    words = ["export", "mamba_pkd_s1", "--checkpoint", str(tmp_path / "weights.safetensors"), "--format", "hf"]
    assert main([*words, "--config", str(folder / "config.yaml"), "--output", str(tmp_path / "out")]) == 0


@NEEDS_ONNX
def test_int8_of_a_run_whose_data_are_gone(gone, capsys):
    folder = gone(data=True)
    assert main(["export", str(folder), "--int8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--int8 measures the accuracy on labelled data: config" in line and "OSError: the disk is gone" in line
    assert not (folder / "export").exists()


def test_no_size_without_data(plain, write, tmp_path, capsys):
    """A model of torchvision has no image size of its own."""
    plain["models"]["model"] = {"key": "mnasnet0_5", "kwargs": {"num_classes": 3}}
    plain["datasets"]["fake/test"]["key"] = "torchvision.datasets.Nothing"
    (tmp_path / "run").mkdir()
    write(plain, "run/config.yaml")
    assert main(["export", str(tmp_path / "run"), "--format", "pt2"]) == 2
    assert "the data cannot be read, and the model has no image size of its own: " in capsys.readouterr().err
