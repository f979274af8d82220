import logging

import pytest

from timm_mamba_pkd.report import read_metrics


def test_reads_every_line_in_order(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0, "student": null}\n{"epoch": 1, "student": "s1"}\n')
    assert read_metrics(path) == [{"epoch": 0, "student": None}, {"epoch": 1, "student": "s1"}]
    path.write_text("")
    assert read_metrics(path) == []
    assert not caplog.records


@pytest.mark.parametrize("rest", [b'{"epoch": 1, "lo', b"{", b"1", b'"\xc3', b"\0\0\0"])
def test_last_line_of_a_killed_run_is_dropped_aloud(rest, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 0}\n' + rest)
    with caplog.at_level(logging.WARNING):
        assert read_metrics(path) == [{"epoch": 0}]
    assert "metrics.jsonl, line 2" in caplog.text


@pytest.mark.parametrize("line", [b'{"epoch": 1, "lo', b"[1]", b""])
def test_broken_line_in_the_middle_is_named(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 0}\n' + line + b'\n{"epoch": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
