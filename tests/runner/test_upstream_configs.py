"""torchdistill's own sample configs with one of our students in place of ResNet-18: set TORCHDISTILL_REPO.

What a run on a few images needs is changed, too: no downloaded teacher weights, one epoch, small batches, no worker
processes, and the size of ImageNet where a loss states it. Everything else is upstream's, as is the example script.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.models import save_weights
from timm_mamba_pkd.models.weights import read_weights
from timm_mamba_pkd.report import count_params, read_csv, read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    name: Path("configs", "sample", "ilsvrc2012", name, f"resnet18_from_{teacher}.yaml")
    for name, teacher in {
        "kd": "resnet34", "kd_w_ls": "resnet34", "skd": "resnet34", "dist": "resnet34", "dist_plus": "resnet34",
        "at": "resnet34", "rkd": "resnet34", "spkd": "resnet34", "pkt": "resnet152", "cse_l2": "resnet34",
        "crd": "resnet50", "srd": "resnet34", "ickd": "resnet34", "ft": "resnet34",
    }.items()
}  # fmt: skip
# Here torchdistill wraps the student, and since 4addaf6 (June 2026) the script validates and saves the wrapper in its
# place. With ResNet-18 it fails in the same way.
WRAPPED = {
    "crd": "TypeError: Linear4CRD.forward() missing 1 required positional argument: 'supp_dict'",
    "srd": "RuntimeError: Error(s) in loading state_dict",
    "ickd": "RuntimeError: Error(s) in loading state_dict",
    "ft": "RuntimeError: selected index k out of range",
}


@pytest.fixture
def repo() -> Path:
    folder = os.environ.get("TORCHDISTILL_REPO")
    if folder is None:
        pytest.skip("the configs are not in the pip package: set TORCHDISTILL_REPO to a checkout of torchdistill")
    return Path(folder).resolve()


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home with a tiny ImageNet in the folder that the configs name; the working directory of the runs."""
    root = tmp_path / "datasets" / "ilsvrc2012"
    modes = ["RGB", "L", "RGBA", "CMYK"]
    for split, per_class in (("train", 4), ("val", 2)):
        for label in ("n01", "n02"):
            (root / split / label).mkdir(parents=True)
            for i in range(per_class):
                image = Image.effect_noise((90 + 37 * i, 120), 80).convert(modes[i])
                image.save(root / split / label / f"{i}.{'png' if modes[i] == 'RGBA' else 'jpg'}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample_config(path: Path, student: dict[str, Any], dst_ckpt: Path) -> str:
    """An upstream config with `student` as its student, cut down to one epoch of a few images."""
    root = yaml.compose(path.read_text())
    models = find(root, "models")
    for key, value in {**student, "dst_ckpt": str(dst_ckpt)}.items():
        replace(find(models, "student_model"), key, value)
    replace(find(models, "teacher_model", "kwargs"), "weights", None)
    sizes = {"num_epochs": 1, "num_workers": 0, "num_negative_samples": 3, "output_size": 8, "num_samples": 8}
    for node in mappings(root):
        for key, _ in node.value:
            if key.value in sizes:
                replace(node, key.value, sizes[key.value])
    for stage in mappings(find(root, "train")):
        for key, loader in stage.value:
            if key.value in ("train_data_loader", "val_data_loader"):
                replace(find(loader, "kwargs"), "batch_size", 4)
    return "dependencies: [{name: timm_mamba_pkd}]\n" + yaml.serialize(root)


def find(node: Any, *path: str) -> Any:
    for key in path:
        node = next(value for name, value in node.value if name.value == key)
    return node


def replace(mapping: yaml.MappingNode, key: str, value: Any) -> None:
    """Set a value in place, so that the aliases of it follow."""
    old, new = find(mapping, key), yaml.compose(yaml.safe_dump(value))
    old.__class__, old.__dict__ = new.__class__, new.__dict__


def mappings(node: Any) -> list[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        return [node, *(found for _, value in node.value for found in mappings(value))]
    return [found for value in node.value for found in mappings(value)] if isinstance(node, yaml.SequenceNode) else []


def set_up(repo: Path, name: str, home: Path) -> tuple[Path, nn.Module, Path]:
    """The config's file, the student as it starts, and where the trained one goes.

    It starts as one that always answers class 0: upstream's script saves nothing as long as no answer is right.
    """
    if not (repo / CONFIGS[name]).is_file():
        pytest.skip(f"this checkout has no {CONFIGS[name]}")
    torch.manual_seed(0)
    student: Any = timm.create_model("mamba_pkd_s1", num_classes=1000)
    with torch.no_grad():
        student.get_classifier().bias[0] = 10.0
    save_weights(student, home / "initial.safetensors")
    kwargs = {"model_name": "mamba_pkd_s1", "num_classes": 1000, "checkpoint_path": str(home / "initial.safetensors")}
    config = home / "config.yaml"
    entry = {"key": "mamba_pkd_resnet_taps", "kwargs": kwargs}
    config.write_text(sample_config(repo / CONFIGS[name], entry, home / "trained.pt"))
    return config, student, home / "trained.pt"


def assert_trained(student: nn.Module, path: Path) -> None:
    before = student.state_dict()
    after = read_weights(path)
    assert after.keys() == before.keys()  # the bare student's
    assert all(value.isfinite().all() for value in after.values())
    names = [name for name, _ in student.named_parameters()]
    assert sum(not after[name].equal(before[name]) for name in names) > 0.5 * len(names)  # the lr is 1e-4 in most


@pytest.mark.parametrize("name", CONFIGS)
def test_mamba_pkd_train(name, repo, home, monkeypatch):
    monkeypatch.setattr("timm_mamba_pkd.runner.results.measure_latency", lambda *args: 1.0)
    config, student, trained = set_up(repo, name, home)
    assert main(["train", "--config", str(config), "--device", "cpu", "--output", "run"]) == 0
    assert_trained(student, trained)
    assert all(record["loss"] > 0 for record in read_metrics(home / "run" / "metrics.jsonl"))
    row = read_csv(home / "run" / "results.csv")[-1]
    assert row.model == "mamba_pkd_s1" and row.param_count == count_params(student) / 1e6  # no tap is deployed


@pytest.mark.parametrize("name", CONFIGS)
def test_example_script(name, repo, home):
    script = repo / "examples" / "torchvision" / "image_classification.py"
    config, student, trained = set_up(repo, name, home)
    result = subprocess.run(
        [sys.executable, str(script), "--config", str(config), "--device", "cpu", "--seed", "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    log = result.stdout + result.stderr
    if name in WRAPPED and "wrapped_student_model" in script.read_text() and WRAPPED[name] in log:
        pytest.xfail(f"the script fails with ResNet-18 as well: {WRAPPED[name]}")
    assert result.returncode == 0, log
    losses = [float(value) for value in re.findall(r"loss: (\S+)", log)]
    assert losses and all(0 < loss < float("inf") for loss in losses)
    if name == "ft":  # the best epoch is the first of the equally good ones, before the student's turn
        assert "Advanced to stage 2" in log
    else:
        assert_trained(student, trained)
