"""Files that are whole or absent."""

import errno
import os
import stat

import pytest

from timm_mamba_pkd.files import WriteError, leftover_files, whole_file, write_file


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


def test_files_of_others_are_no_leftovers(tmp_path):
    for name in (".my.tmp", ".notes.1.tmp", "mamba-pkd.tmp"):
        (tmp_path / name).touch()
    assert not list(leftover_files(tmp_path))


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_replaces_nothing(links, tmp_path, monkeypatch):
    """Also where it appears in the meantime, and on file systems without links."""

    def refuse(*args):
        raise PermissionError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    write_file(path, b"one", replace=False)
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]
    path.unlink()
    monkeypatch.setattr(os, "fsync", lambda descriptor: path.write_bytes(b"another's"))
    with pytest.raises(WriteError, match="File exists") as error:
        write_file(path, b"two", replace=False)
    assert error.value.errno == errno.EEXIST
    assert path.read_bytes() == b"another's" and list(tmp_path.iterdir()) == [path]


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
