"""A progressive config under torchdistill's own example script, unmodified: set TORCHDISTILL_REPO to its checkout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_mamba_pkd.report import read_csv

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path("examples", "torchvision", "image_classification.py")
STUDENTS = ["mamba_pkd_s1"] * 3


@pytest.fixture
def repo() -> Path:
    folder = os.environ.get("TORCHDISTILL_REPO")
    if folder is None:
        pytest.skip("the example script is not in the pip package: set TORCHDISTILL_REPO to a checkout of torchdistill")
    return Path(folder).resolve()


def train_with_upstreams_script(repo: Path, config: Path, cwd: Path) -> str:
    """The log of a run, which must succeed."""
    result = subprocess.run(
        [sys.executable, str(repo / SCRIPT), "--config", str(config), "--device", "cpu", "--seed", "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    return log


@pytest.mark.parametrize("rule", ["independent", "bdistil", "assistant"])
def test_example_script_takes_every_rule(repo, progressive, write, tmp_path, rule):
    for model in progressive["models"].values():
        model["kwargs"]["num_classes"] = 5  # the script measures top-5
    progressive["models"]["student_model"]["kwargs"]["combination"] = "per_student"
    progressive["models"]["student_model"]["dst_ckpt"] = str(tmp_path / "ensemble.pt")
    schedule = progressive["train"]["init"]["kwargs"]
    schedule |= {"rule": rule, "cache_dir": str(tmp_path / "cache"), "views": {"num_views": 1, "mixup_alpha": 0.2}}
    schedule["views"]["num_classes"] = 5
    log = train_with_upstreams_script(repo, write(progressive), tmp_path)
    assert "Stage 1  logits of teacher: 24 computed, 0 cached" in log or rule == "bdistil", log
    assert "Stage 2  logits of teacher: 0 computed, 24 cached" in log or rule == "bdistil", log
    assert ("Stage 2  mamba_pkd_s2  weak learning condition" in log) == (rule == "bdistil"), log
    assert (tmp_path / "ensemble.pt").exists()


def test_example_script_trains_the_whole_ensemble(repo, progressive, build, write, run, tmp_path):
    digits = [
        build.call(
            "timm_mamba_pkd.datasets.Digits", split=split, transform=build.call("torchvision.transforms.ToTensor")
        )
        for split in ("train", "val", "test")
    ]
    progressive["datasets"] = dict(zip(("fake/train", "fake/val", "fake/test"), digits, strict=True))
    models, schedule = progressive["models"], progressive["train"]["init"]["kwargs"]
    for model in models.values():
        model["kwargs"]["num_classes"] = 10  # the script measures top-5
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    models["teacher_model"]["src_ckpt"] = str(tmp_path / "teacher.pt")
    models["student_model"]["dst_ckpt"] = str(tmp_path / "ensemble.pt")
    models["student_model"]["kwargs"]["students"] = schedule["students"] = STUDENTS
    schedule["rule"] = {"key": "residual", "kwargs": {"weight": 0.02}}
    schedule["cache_dir"] = str(tmp_path / "cache")
    schedule["train_data_loader"]["kwargs"]["batch_size"] = 32
    schedule["optimizer"]["kwargs"]["lr"] = 0.003
    schedule["val_data_loader"]["dataset_id"] = "fake/train"

    log = train_with_upstreams_script(repo, write(progressive), tmp_path)
    assert [int(n) for n in re.findall(r"(?:Started|Advanced to) stage (\d)", log)] == [1, 2, 3]

    # The script keeps the best epoch of all stages, which is the last here: each student adds one to ten points.
    weights = torch.load(tmp_path / "ensemble.pt", weights_only=False)["model"]
    assert weights["active"].all()
    steps = -(-1257 // 32)
    assert [int(weights[f"students.{i}.stem.norm.num_batches_tracked"]) for i in range(3)] == [steps] * 3

    # Its accuracies of the teacher and the ensemble are ours.
    accuracies = [float(value) for value in re.findall(r"Acc@1 ([\d.]+)", log)][-2:]
    (tmp_path / "ours" / "weights").mkdir(parents=True)
    save_file(weights, tmp_path / "ours" / "weights" / "ensemble.safetensors")
    code, folder = run(progressive, command="evaluate", output="ours")
    assert code == 0
    rows = read_csv(folder / "results.csv")
    assert [rows[0].top1, rows[-1].top1] == pytest.approx(accuracies, abs=1e-3)
    assert rows[-1].top1 > 80
