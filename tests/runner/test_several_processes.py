"""One run in several processes, as torchrun starts them: on the CPU, by gloo."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from timm_mamba_pkd.distillation.logits_cache import row_dtype
from timm_mamba_pkd.report import read_csv

ROOT = Path(__file__).resolve().parents[2]
SGD = {"key": "SGD", "kwargs": {"lr": 0.1, "momentum": 0.9}}  # Adam makes large steps of rounding errors
Together = Callable[..., tuple[list[int], list[str], float | None]]

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]


@pytest.fixture
def together(zygote, tmp_path) -> Together:
    """Run a command in `world` processes in tmp_path: (exit codes, outputs, seconds from the fault to the end)."""

    def together(
        config: Path, *flags: str, world: int = 2, fault: dict[str, Any] | None = None, command: str = "train",
        output: str = "run",
    ) -> tuple[list[int], list[str], float | None]:  # fmt: skip
        log, moment = tmp_path / "output", tmp_path / "moment"
        for path in (*tmp_path.glob("output*"), moment):
            path.unlink(missing_ok=True)
        argv = [command, "--config", str(config), "--device", "cpu", "--output", output, *flags]
        fault = None if fault is None else {"delay": 0, "n": 1, "moment": str(moment), **fault}
        order = {"argv": argv, "cwd": str(tmp_path), "output": str(log), "fault": fault, "world": world}
        zygote.stdin.write(json.dumps(order) + "\n")
        zygote.stdin.flush()
        answer = json.loads(zygote.stdout.readline())
        outputs = [path.read_text() for path in sorted(tmp_path.glob("output*"))]
        return answer["codes"], outputs, answer["seconds"]

    return together


@pytest.fixture
def config(progressive, write) -> Callable[..., Path]:
    """The tiny progressive config, 24 training images, with a batch size and other arguments of the schedule."""

    def config(batch_size: int = 4, name: str = "config.yaml", **schedule: Any) -> Path:
        kwargs = progressive["train"]["init"]["kwargs"]
        kwargs.update({"optimizer": SGD, "log_freq": 1, **schedule})
        kwargs["train_data_loader"]["kwargs"] = {"batch_size": batch_size}
        kwargs["val_data_loader"]["kwargs"]["batch_size"] = 5  # 12 images
        return write(progressive, name)

    return config


def losses(output: str) -> list[float]:
    """Of the log's lines, one per step."""
    lines = [line.split() for line in output.splitlines() if "  step " in line]
    return [float(line[line.index("loss") + 1]) for line in lines]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights" / "ensemble.safetensors")


def test_two_processes_are_as_one_with_the_same_global_batch(together, config, progressive, tmp_path):
    """Curves, weights, fitted combination, test results and cached logits; 21 test images do not divide."""
    progressive["models"]["student_model"]["kwargs"]["combination"] = "per_student"
    schedule = {"num_epochs": 2, "cache_dir": "cache", "views": {"num_views": 1}}
    folders, caches = [], []
    for world, batch_size in ((1, 8), (2, 4)):
        codes, outputs, _ = together(
            config(batch_size, **schedule), "--sync-bn", world=world, output=f"of{world}",
        )  # fmt: skip
        assert codes == [0] * world, outputs
        assert not any(output for output in outputs[1:]), "rank 0 alone speaks"
        assert len(losses(outputs[0])) == 2 * 2 * 3
        folders.append(tmp_path / f"of{world}")
        caches.append({path.name: path.read_bytes() for path in sorted((tmp_path / "cache").glob("teacher-*/*.npy"))})
        (tmp_path / "cache").rename(tmp_path / f"cache{world}")
    one, two = (metrics(folder) for folder in folders)
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert [second[name] for name in ("lr", "val_top1", "val_top1_student", "epoch")] == [
            first[name] for name in ("lr", "val_top1", "val_top1_student", "epoch")
        ]
    own = weights(folders[1])
    for name, tensor in weights(folders[0]).items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-3, atol=1e-4)
    rows = [[(row.model, row.top1) for row in read_csv(folder / "results.csv")] for folder in folders]
    assert rows[0] == rows[1]
    first, second = (np.frombuffer(cache["view_0000.npy"][-240:], row_dtype(3))["logits"] for cache in caches)
    np.testing.assert_allclose(first, second, rtol=2e-3, atol=1e-3)
    for world in (1, 2):
        codes, outputs, _ = together(tmp_path / "of1" / "config.yaml", world=world, command="evaluate", output="of1")
        assert codes == [0] * world
        table = [line.split() for line in outputs[0].splitlines() if line.startswith(("test_resnet", "mamba", "ens"))]
        top1 = [float(cells[2 if cells[1] == "teacher" else 3]) for cells in table]
        assert top1 == [pytest.approx(row.top1, abs=0.006) for row in read_csv(tmp_path / "of1" / "results.csv")]


@pytest.mark.parametrize(("world", "samples"), [(2, 41), (3, 29)])
def test_a_last_batch_that_does_not_divide(world, samples, together, config, progressive, build, tmp_path):
    """One sample for two processes, five for three: each counts once, as in one process."""
    for name, count, offset in (("train", samples, 0), ("val", 12, 100), ("test", 21, 200)):
        progressive["datasets"][f"fake/{name}"] = build.fake_images(count, offset, side=16)
    progressive["models"]["student_model"]["kwargs"] |= {"students": ["mamba_pkd_s1"], "img_size": 16}
    schedule = {"num_epochs": 2, "students": ["mamba_pkd_s1"], "rule": "independent"}
    results = []
    for processes, batch_size in ((1, 4 * world), (world, 4)):
        path = config(batch_size, **schedule)
        codes, outputs, _ = together(path, "--sync-bn", world=processes, output=f"of{processes}")
        assert codes == [0] * processes, outputs
        folder = tmp_path / f"of{processes}"
        results.append((losses(outputs[0]), [line["loss"] for line in metrics(folder)], weights(folder)))
    (steps, epochs, one), (own_steps, own_epochs, own) = results
    assert own_steps == pytest.approx(steps, rel=1e-3) and own_epochs == pytest.approx(epochs, rel=1e-4)
    for name, tensor in one.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-3, atol=1e-4)


def test_nan_of_one_process_stops_all_before_the_step(together, config, progressive, tmp_path):
    (tmp_path / "poisoned.py").write_text(
        "from torchvision.datasets import FakeData\n"
        "class Poisoned(FakeData):\n"
        "    def __getitem__(self, index):\n"
        "        image, label = super().__getitem__(index)\n"
        "        return image * float('nan') if index == 19 else image, label\n"
    )
    progressive["datasets"]["fake/train"]["key"] = "poisoned.Poisoned"
    sampler = progressive["train"]["init"]["kwargs"]["val_data_loader"]["sampler"]
    progressive["train"]["init"]["kwargs"]["train_data_loader"]["sampler"] = sampler  # in order
    path = config(num_epochs=2)
    codes, outputs, _ = together(path)
    assert codes == [2, 2]
    for output in outputs:
        (line,) = [line for line in output.splitlines() if "error" in line]
        assert line == (
            "mamba-pkd: error: the loss became nan at epoch 1, step 3 on the samples 17, 19, 21, 23 of rank 1; there "
            "is no checkpoint yet: lower the lr, or pass over it with --on-nonfinite skip"
        )
    assert len(losses(outputs[0])) == 2 and not (tmp_path / "run" / "weights").exists()
    text = (tmp_path / "poisoned.py").read_text()
    (tmp_path / "poisoned.py").write_text(text.replace("19", "18"))  # rank 0, whose statistics all take over
    codes, outputs, _ = together(path, "--on-nonfinite", "skip", "--fresh")
    assert codes == [0, 0], outputs
    assert outputs[0].count("Skipped a batch: the loss became nan") == 4
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_a_process_that_is_killed_ends_the_run(together, rich, write, tmp_path, assert_same_run):
    rich["train"]["init"]["kwargs"]["train_data_loader"]["kwargs"]["batch_size"] = 4
    path = write(rich)
    assert together(path, output="whole")[0] == [0, 0]
    fault = {"phase": "training", "n": 5, "number": signal.SIGKILL, "rank": 1}
    codes, outputs, seconds = together(path, fault=fault)
    assert codes == [1, -signal.SIGKILL], outputs
    assert seconds is not None and seconds < 60
    (line,) = [line for line in outputs[0].splitlines() if "error" in line]
    assert line.startswith("mamba-pkd: error: another process of the run has ended, or cannot be reached (")
    assert "; the same command goes on from run/checkpoints/stage1_epoch0001_000000024-" in line
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert together(path)[0] == [0, 0]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    codes, outputs, _ = together(path, world=1, output="alone")
    assert codes == [0], outputs
    assert "Going on from checkpoint alone/checkpoints/stage1_epoch0001_000000024-" in outputs[0]
    assert [record["epoch"] for record in metrics(tmp_path / "alone")] == [
        record["epoch"] for record in metrics(tmp_path / "whole")
    ]


@pytest.mark.parametrize(("world", "samples"), [(1, 8), (2, 16)])
def test_a_signal_to_one_process_ends_all(together, rich, write, tmp_path, assert_same_run, world, samples):
    """In the middle of an epoch and of accumulated gradients; then as many, and then another number, go on."""
    rich["train"]["init"]["kwargs"]["train_data_loader"]["kwargs"]["batch_size"] = 4
    path = write(rich)
    assert together(path, world=world, output="whole")[0] == [0] * world
    n = samples // (4 * world) + 1
    fault = {"phase": "training", "n": n - 1, "number": signal.SIGTERM, "rank": world - 1}
    codes, outputs, seconds = together(path, world=world, fault=fault)
    assert codes == [143] * world, outputs
    assert seconds is not None and seconds < 30
    assert outputs[0].count("mamba-pkd: ended by SIGTERM; the same command goes on from there") == 1
    assert len(list((tmp_path / "run" / "checkpoints").glob(f"stage1_epoch0001_{samples:09}-*.pt"))) == 1
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert together(path, world=world)[0] == [0] * world
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    codes, outputs, _ = together(path, world=3 - world, output="other")
    assert codes == [0] * (3 - world), outputs
    assert len(metrics(tmp_path / "other")) == len(metrics(tmp_path / "whole"))


def test_an_error_is_said_once(together, config, progressive, tmp_path):
    """Of all processes; then of one, whose training images are not there."""
    codes, outputs, _ = together(config(combination="none"))
    assert codes == [2, 2]
    assert len(outputs[0].splitlines()) == 1 and outputs[1] == "", outputs
    assert outputs[0].startswith("mamba-pkd: error: ") and "unknown key 'combination'" in outputs[0]
    (tmp_path / "picky.py").write_text(
        "import os\n"
        "from torchvision.datasets import FakeData\n"
        "def data(**kwargs):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise FileNotFoundError('no images here')\n"
        "    return FakeData(**kwargs)\n"
    )
    del progressive["train"]["init"]["kwargs"]["combination"]
    progressive["datasets"]["fake/train"]["key"] = "picky.data"
    codes, outputs, _ = together(config())
    assert codes == [2, 2]
    assert len(outputs[0].splitlines()) == 1 and outputs[1] == "", outputs
    assert outputs[0].startswith("mamba-pkd: error: on rank 1: config ") and "no images here" in outputs[0]
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_in_its_first_batch(together, config, progressive, tmp_path):
    """The other's check goes further by then."""
    (tmp_path / "poisoned.py").write_text(
        "import os\n"
        "from torchvision.datasets import FakeData\n"
        "class Poisoned(FakeData):\n"
        "    def __getitem__(self, index):\n"
        "        image, label = super().__getitem__(index)\n"
        "        return image * float('nan') if os.environ['RANK'] == '1' else image, label\n"
    )
    progressive["datasets"]["fake/train"]["key"] = "poisoned.Poisoned"
    codes, outputs, _ = together(config())
    assert codes == [2, 2]
    assert outputs[1] == "", outputs
    (line,) = [line for line in outputs[0].splitlines() if "mamba-pkd: error" in line]
    assert line.startswith("mamba-pkd: error: on rank 1: config ") and "the loss of the first batch is nan" in line


def test_broken_images_of_all_processes_count(together, config, progressive, tmp_path):
    """Each meets fewer than the ten that are allowed, both more."""
    (tmp_path / "broken.py").write_text(
        "from torchvision.datasets import FakeData\n"
        "class Broken(FakeData):\n"
        "    def __getitem__(self, index):\n"
        "        if index in (0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23):\n"
        "            raise OSError('broken')\n"
        "        return super().__getitem__(index)\n"
    )
    progressive["datasets"]["fake/train"]["key"] = "broken.Broken"
    sampler = progressive["train"]["init"]["kwargs"]["val_data_loader"]["sampler"]
    progressive["train"]["init"]["kwargs"]["train_data_loader"]["sampler"] = sampler  # in order
    codes, outputs, _ = together(config())
    assert codes == [2, 2]
    (line,) = [line for line in outputs[0].splitlines() if "error" in line]
    assert line.startswith("mamba-pkd: error: 12 of 24 samples of data set 'fake/train' cannot be read")
    assert "error" not in outputs[1] and not (tmp_path / "run" / "weights").exists()


def test_torchrun(plain, write, tmp_path):
    """The real one: a run, then one of a config that is wrong."""
    plain["train"]["train_data_loader"]["kwargs"]["batch_size"] = 4
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "timm_mamba_pkd", "train", "--config", str(write(plain)), "--device", "cpu", "--output", "run"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.csv").exists() and len(metrics(tmp_path / "run")) == 1
    assert done.stdout.count("Report (tables") == 1


@pytest.mark.parametrize("names", [["RANK"], ["SLURM_PROCID", "SLURM_NTASKS"], ["RANK", "WORLD_SIZE", "LOCAL_RANK"]])
def test_ranks_without_torchrun_are_one_process(plain, run, monkeypatch, names):
    for name in names:
        monkeypatch.setenv(name, "2" if name in ("WORLD_SIZE", "SLURM_NTASKS") else "1")
    assert run(plain)[0] == 0
