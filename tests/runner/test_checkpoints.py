"""Checkpoints are whole, verified, and few."""

import hashlib
import io
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from timm_mamba_pkd.runner.checkpoints import Checkpoints
from timm_mamba_pkd.runner.errors import ConfigError

pytestmark = pytest.mark.fault


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def state(number: int) -> dict[str, Any]:
    return {"number": number, "content": torch.full((1000,), float(number))}


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(re.sub(r"-[0-9a-f]{16}", "", path.name) for path in checkpoints.folder.iterdir())


def test_nothing_saved(checkpoints):
    assert checkpoints.load() is None and checkpoints.last() is None


def test_a_checkpoint_is_named_by_its_content(checkpoints):
    path = checkpoints.save(state(1), stage=2, epoch=13, samples=512)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"stage2_epoch0013_000000512-{digest[:16]}.pt"
    loaded = torch.load(path, weights_only=True)
    assert loaded["number"] == 1 and torch.equal(loaded["content"], state(1)["content"])


def test_the_last_two_and_the_best_of_each_stage_are_kept(checkpoints):
    for epoch in range(1, 6):
        path = checkpoints.save(state(epoch), 1 + (epoch > 3), epoch, 100)
        if epoch in (1, 2, 4):
            checkpoints.keep_best(path, 1 + (epoch > 3))
    assert names(checkpoints) == [
        "best_stage1.pt", "best_stage2.pt", "stage2_epoch0004_000000100.pt", "stage2_epoch0005_000000100.pt",
    ]  # fmt: skip
    (best,) = checkpoints.folder.glob("best_stage1-*.pt")
    assert torch.load(best, weights_only=True)["number"] == 2
    last = checkpoints.load()
    assert last is not None and last["number"] == 5


def test_positions_are_compared_as_numbers(checkpoints):
    for stage, epoch, samples in (
        (2, 99_998, 0),
        (2, 99_999, 999_999_999),
        (2, 99_999, 1_000_000_000),
        (10, 99_999, 0),
    ):
        checkpoints.save(state(samples), stage, epoch, samples)
        last = checkpoints.last()
        assert last is not None and last.name.startswith(f"stage{stage}_epoch{epoch:04}_{samples:09}-")


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [truncate, flip, lambda content: bytes(len(content)), lambda content: b""])
def test_a_damaged_one_is_set_aside_for_the_one_before(damage, checkpoints, caplog):
    checkpoints.save(state(1), 1, 1, 100)
    last = checkpoints.save(state(2), 1, 2, 100)
    last.write_bytes(damage(last.read_bytes()))
    with caplog.at_level(logging.INFO):
        loaded = checkpoints.load()
    assert loaded is not None and loaded["number"] == 1
    assert caplog.messages[0] == f"Checkpoint {last} is damaged (checksum) and set aside"
    assert last.with_suffix(".damaged").exists()
    # It does not count as one of the last two.
    checkpoints.save(state(2), 1, 2, 100)
    assert len(list(checkpoints.folder.glob("stage*.pt"))) == 2


def test_all_damaged(checkpoints):
    for epoch in (1, 2):
        checkpoints.save(state(epoch), 1, epoch, 100).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"all checkpoints in .* are damaged: start anew with --fresh"):
        checkpoints.load()


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_nothing_in_a_checkpoint_is_executed(checkpoints, tmp_path):
    content = pickle.dumps(Hostile(tmp_path / "executed"))
    digest = hashlib.sha256(content).hexdigest()
    checkpoints.folder.mkdir()
    (checkpoints.folder / f"stage1_epoch0001_000000100-{digest[:16]}.pt").write_bytes(content)
    with pytest.raises(ConfigError, match="damaged"):
        checkpoints.load()
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_leaves_the_last_good_one(checkpoints):
    resource = pytest.importorskip("resource", reason="this system has no limits")
    good = checkpoints.save(state(1), 1, 1, 100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ConfigError, match="cannot be written: File too large") as error:
            checkpoints.save({"content": torch.zeros(1_000_000)}, 1, 2, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value).endswith(f"; the last good checkpoint is {good}")
    assert list(checkpoints.folder.iterdir()) == [good]
    loaded = checkpoints.load()
    assert loaded is not None and loaded["number"] == 1


def test_what_a_killed_process_left_is_removed(checkpoints):
    checkpoints.folder.mkdir()
    (checkpoints.folder / ".stage1.pt.1.mamba-pkd.tmp").write_bytes(b"half")
    path = checkpoints.save(state(1), 1, 1, 100)
    assert list(checkpoints.folder.iterdir()) == [path]


def test_what_cannot_be_read_just_now_is_no_damage(checkpoints, monkeypatch):
    path = checkpoints.save(state(1), 1, 1, 100)

    def fail(self: Path) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(ConfigError, match="cannot be read: Input/output error"):
            checkpoints.load()
    loaded = checkpoints.load()
    assert loaded is not None and loaded["number"] == 1 and path.exists()


class Command:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "content",
    [
        *(pickle.dumps(Command(), 2), b"hello", b"\x80\x02h\xff.", b"\x80\x02}K\x01s."),
        b"\x80\x02ccollections\nOrderedDict\nK\x01R.", torch.zeros(2), None, [1],
    ],
    ids=["command", "text", "unknown memo", "empty stack", "wrong call", "tensor", "nothing", "list"],
)  # fmt: skip
def test_what_is_no_checkpoint_is_set_aside(checkpoints, content, monkeypatch, tmp_path):
    """Its checksum is right all the same."""
    monkeypatch.chdir(tmp_path)
    checkpoints.save(state(1), 1, 1, 100)
    if not isinstance(content, bytes):
        file = io.BytesIO()
        torch.save(content, file)
        content = file.getvalue()
    forged = checkpoints.folder / f"stage1_epoch0002_000000100-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    forged.write_bytes(content)
    loaded = checkpoints.load()
    assert loaded is not None and loaded["number"] == 1
    assert forged.with_suffix(".damaged").exists() and not (tmp_path / "executed").exists()
