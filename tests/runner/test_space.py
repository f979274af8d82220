"""The disk space of a run: estimated before it, and asked for."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from timm_mamba_pkd.runner.check import StageEstimate, check
from timm_mamba_pkd.runner.config import prepare
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.space import require_space, run_bytes, size

CPU = torch.device("cpu")


def test_disk(progressive, run, write, monkeypatch, errors, tmp_path):
    job = prepare(write(progressive), CPU)
    parameters = sum(tensor.numel() * tensor.element_size() for tensor in job.student.state_dict().values())
    assert run_bytes(job, []) == 2 * parameters  # each student and the ensemble
    progressive["models"]["student_model"]["dst_ckpt"] = str(tmp_path / "ensemble.pt")
    job = prepare(write(progressive), CPU)
    assert run_bytes(job, []) == 3 * parameters
    cache = {"cache_bytes": 1000, "cache_dir": str(tmp_path / "new" / "cache")}
    first = StageEstimate("mamba_pkd_s1", 1, 1, 0.1, **cache, checkpoint_bytes=50, trained_bytes=10)
    second = StageEstimate("mamba_pkd_s2", 1, 1, 0.1, **cache, checkpoint_bytes=70, trained_bytes=20)
    # The best of both stages, and of the larger one the last two and one in the making.
    assert run_bytes(job, [first, second]) == 3 * parameters + 50 + 70 + 3 * 70
    assert run_bytes(job, [first, second], averages=True) == 3 * parameters + 60 + 90 + 3 * 90
    written = 3 * parameters + 330
    assert require_space(job, Path("runs/new/folder"), [first, second]) == (written, 2000)
    here = [replace(stage, cache_dir="runs/new/folder") for stage in (first, second)]
    with monkeypatch.context() as patch:  # where caches are in the run's own folder, all must fit there
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": written + 1999}))
        with pytest.raises(ConfigError, match="the run needs about"):
            require_space(job, Path("runs/new/folder"), here)
    total = run_bytes(job, check(job, CPU))

    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    for command in ("check", "train"):
        code, folder = run(progressive, command=command)
        assert code == 2 and not folder.exists()
        (line,) = errors()
        message = f"the run needs about {size(total)}, but only 1 kB are free in {tmp_path}"
        assert re.fullmatch(rf"line \d+: {re.escape(message)}", line)


def test_more_views_than_disk(progressive, run, errors, tmp_path):
    schedule = progressive["train"]["init"]["kwargs"]
    schedule |= {"cache_dir": str(tmp_path / "cache"), "num_epochs": 10**12, "views": {"num_views": 10**12}}
    for command in ("check", "train"):
        code, folder = run(progressive, command=command)
        assert code == 2 and not folder.exists() and not (tmp_path / "cache").exists()
        (line,) = errors()
        # 24 samples, 3 classes: 10 bytes a row; the residual rule caches the teacher and the first student.
        assert re.fullmatch(
            r"line \d+: the run needs about 480 TB, 480 TB of them for cached logits \(fewer num_views take less\), "
            rf"but only .*B are free in {tmp_path}",
            line,
        ), line


def test_sizes_for_people():
    assert [size(n) for n in (12, 1234, 5_000_000, 7.1e9, 2e12)] == ["12 B", "1.23 kB", "5 MB", "7.1 GB", "2 TB"]
