"""A disk that is full: one clear error, and the last good checkpoint stays."""

import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from timm_mamba_pkd.runner import checkpoints, destination, results, run_folder
from timm_mamba_pkd.runner import train as training

pytestmark = pytest.mark.fault


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full_in(monkeypatch) -> Callable[[Any, str, int], None]:
    """The disk is full in the n-th call (from 1) of a function."""

    def full_in(owner: Any, name: str, n: int) -> None:
        function, calls = getattr(owner, name), [0]

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] != n:
                return function(*args, **kwargs)
            with full_after(10):
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    return full_in


@pytest.mark.parametrize(
    ("owner", "name", "n", "file"),
    [
        (training, "save_weights", 2, "weights/model.safetensors"),
        (run_folder.RunFolder, "log_metrics", 2, "metrics.jsonl"),
        (run_folder.RunFolder, "note_start", 1, "run.json"),
        (training.logger, "info", 3, "log.txt"),
        (results, "write_report", 1, "results.md"),
        (destination, "write_file", 1, "model.pt"),
        (checkpoints.Checkpoints, "save", 2, "checkpoints"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_a_run(owner, name, n, file, plain, run, full_in, errors, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    plain["train"] |= {"num_epochs": 2}
    plain["models"]["model"]["dst_ckpt"] = str(tmp_path / "run" / "model.pt")
    _, whole = run(plain, output="whole")
    (tmp_path / "run" / "model.pt").rename(tmp_path / "whole.pt")
    (tmp_path / "run").rmdir()
    with monkeypatch.context():
        full_in(owner, name, n)
        code, folder = run(plain)
        assert code == 2
    (line,) = errors()
    assert str(folder / file) in line and "File too large" in line, line
    last = checkpoints.Checkpoints(folder / "checkpoints").last()
    if name != "note_start":
        assert last is not None and str(last) in line and last.stat().st_size > 10_000
    if name != "info":
        assert line.endswith((folder / "log.txt").read_text().splitlines()[-1].split("\t")[-1])
    monkeypatch.undo()
    monkeypatch.setattr("timm_mamba_pkd.runner.results.measure_latency", lambda *args: 1.0)
    assert run(plain)[0] == 0  # with space again it goes on
    assert (folder / "weights" / "model.safetensors").read_bytes() == (
        whole / "weights" / "model.safetensors"
    ).read_bytes()
    assert not list(folder.rglob("*.tmp"))


def test_cache(progressive, run, full_in, errors, tmp_path):
    from timm_mamba_pkd.distillation import logits_cache

    progressive["train"]["init"]["kwargs"]["cache_dir"] = str(tmp_path / "cache")
    full_in(logits_cache.LogitsCache, "_create", 1)
    assert run(progressive)[0] == 2
    (line,) = errors()
    assert line.startswith(f"cache {tmp_path}/cache/teacher-") and "cannot be written: File too large" in line
