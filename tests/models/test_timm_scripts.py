"""timm's own scripts, unmodified, on a student: set TIMM_REPO to a checkout of pytorch-image-models."""

import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
STUDENT = ["--model", "mamba_pkd_s3", "--img-size", "32"]
CPU = ["--device", "cpu", "--workers", "1"]
TRAINING = ["-b", "50", "--no-aug", "--opt", "adamw", "--lr", "4e-3", "--warmup-epochs", "0"]


@pytest.fixture(scope="module")
def repo() -> Path:
    folder = os.environ.get("TIMM_REPO")
    if folder is None:
        pytest.skip("the scripts are not in the pip package: set TIMM_REPO to a checkout of pytorch-image-models")
    return Path(folder).resolve()


@pytest.fixture(scope="module")
def run(repo, tmp_path_factory):
    """Runs a script in a folder with an ImageFolder ``digits``; returns what it printed."""
    folder = tmp_path_factory.mktemp("scripts")
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    for i, (pixels, label) in enumerate(zip(images[:400], labels[:400], strict=True)):
        target = folder / "digits" / ("train" if i < 300 else "validation") / str(label) / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels.reshape(8, 8) * 15).astype("uint8")).resize((32, 32)).save(target)

    def run(script: str, *arguments: str, fails: bool = False) -> str:
        result = subprocess.run(
            [sys.executable, str(repo / script), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert (result.returncode != 0) == fails, result.stdout + result.stderr
        return result.stdout + result.stderr

    run.folder = folder  # pyright: ignore[reportFunctionMemberAccess]
    return run


def train(run, name: str, *arguments: str) -> str:
    return run(
        "train.py",
        "--data-dir",
        "digits",
        *STUDENT,
        *CPU,
        *TRAINING,
        "--experiment",
        name,
        "--output",
        "out",
        *arguments,
    )


@pytest.fixture(scope="module")
def trained(run) -> tuple[str, float]:
    """A checkpoint of train.py with ten classes, and its accuracy."""
    log = train(run, "first", "--num-classes", "10", "--epochs", "5")
    (accuracy,) = re.findall(r"Best metric: ([\d.]+)", log)
    return "out/first/model_best.pth.tar", float(accuracy)


def test_train_and_validate(run, trained):
    checkpoint, accuracy = trained
    assert accuracy > 50
    log = run(
        "validate.py",
        "--data-dir",
        "digits",
        "--split",
        "validation",
        *STUDENT,
        *CPU,
        "--num-classes",
        "10",
        "--checkpoint",
        checkpoint,
    )
    assert float(re.findall(r"\* Acc@1 ([\d.]+)", log)[-1]) == accuracy


def test_forgotten_class_count(run, trained):
    log = run("validate.py", "--data-dir", "digits", *STUDENT, *CPU, "--checkpoint", trained[0], fails=True)
    assert "head.fc.weight (10, 80) instead of (1000, 80)" in log.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--initial-checkpoint"], "The classifier starts anew"),
        (["--in-chans", "1", "--pretrained", "--pretrained-path"], "from 3 to 1 channel"),
    ],
)
def test_fine_tuning_to_another_class_count(run, trained, arguments, message):
    checkpoint, _ = trained
    log = train(run, arguments[-1].strip("-"), "--num-classes", "12", "--epochs", "1", *arguments, checkpoint)
    assert message in log
    assert float(re.findall(r"Best metric: ([\d.]+)", log)[0]) > 40, "one epoch from scratch is at about 15 %"


def test_inference(run, trained):
    if importlib.util.find_spec("pandas") is None:
        pytest.skip("timm's inference.py imports pandas")
    run("inference.py", "--data-dir", "digits/validation", *STUDENT, *CPU, "--num-classes", "10", "--checkpoint",
        trained[0], "--topk", "1", "--include-index", "--results-dir", "inference",
        "--results-format", "csv")  # fmt: skip
    (results,) = (run.folder / "inference").glob("*.csv")
    rows = list(csv.DictReader(results.open()))
    true = {path.name: path.parent.name for path in (run.folder / "digits" / "validation").rglob("*.png")}
    assert len(rows) == len(true) == 100
    hits = sum(true[row["filename"]] == row["index"] for row in rows)
    assert hits == trained[1]


def test_benchmark(run):
    run("benchmark.py", *STUDENT, "--device", "cpu", "-b", "4", "--bench", "both", "--num-warm-iter", "1",
        "--num-bench-iter", "10", "--results-file", "benchmark.csv")  # fmt: skip
    (row,) = csv.DictReader((run.folder / "benchmark.csv").open())
    assert row["model"] == "mamba_pkd_s3"
    assert float(row["infer_samples_per_sec"]) > 0 and float(row["train_samples_per_sec"]) > 0
    assert row["param_count"] == "0.22"


def test_onnx_export(run, trained):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run("onnx_export.py", "s3.onnx", *STUDENT, "--num-classes", "10", "--checkpoint", trained[0], "--check-forward")
    session = runtime.InferenceSession(str(run.folder / "s3.onnx"), providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    (logits,) = session.run(None, {image.name: torch.zeros(1, 3, 32, 32).numpy()})
    assert logits.shape == (1, 10)
