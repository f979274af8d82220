"""Files that are whole or absent."""

import os
import stat

import pytest

from timm_mamba_pkd.files import leftover_files, whole_file, write_file


def test_content_and_permissions(tmp_path):
    path, plain = tmp_path / "file", tmp_path / "plain"
    plain.write_bytes(b"")
    for content in (b"one", b"", b"another"):
        write_file(path, content)
        assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert sorted(tmp_path.iterdir()) == [path, plain]


def test_nothing_is_seen_before_the_end(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"before")
    with whole_file(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
        (leftover,) = leftover_files(tmp_path)
        assert leftover.read_bytes() == b"after"
    assert path.read_bytes() == b"after" and not list(leftover_files(tmp_path))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_leaves_what_was_there(failing, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"before")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, b"after")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


def test_a_full_disk(tmp_path):
    resource = pytest.importorskip("resource", reason="this system has no limits")
    path = tmp_path / "file"
    write_file(path, b"before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_file(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]
