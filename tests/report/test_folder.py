import importlib.util
import logging

import pytest

from timm_mamba_pkd.report import Row, plots, read_csv, write_report

ROWS = [
    Row("mamba_pkd_s1", "student", 1, 98.5, 0.01, 0.0025, None, 1.0),
    Row("mamba_pkd_ensemble", "ensemble", 1, 98.5, 0.01, 0.0025, None, 1.0),
]
METRICS = [
    {"stage": 1, "student": "s1", "epoch": 0, "loss": 1.0, "val_top1": 97.0, "val_top1_student": 97.0},
    {"stage": 2, "student": "s2", "epoch": 1, "loss": 0.5, "val_top1": 98.5, "val_top1_student": 98.0},
]
needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs the extra [demo]")


@needs_matplotlib
def test_report_is_a_folder_of_four_files(tmp_path):
    write_report(ROWS, METRICS, tmp_path / "new" / "report", device_name="a device", seed=3)
    files = {path.name: path.read_bytes() for path in (tmp_path / "new" / "report").iterdir()}
    assert sorted(files) == ["accuracy_macs.png", "curves.png", "results.csv", "results.md"]
    assert files["curves.png"].startswith(b"\x89PNG")
    assert read_csv(tmp_path / "new" / "report" / "results.csv") == ROWS
    table, conventions = files["results.md"].decode().split("\n\n")
    assert len(table.splitlines()) == 2 + len(ROWS)
    assert conventions == (
        "MACs are those of one image, the selective scan included, elementwise work not; 1 MAC = 2 FLOPs. "
        "Latency is the median at batch size 1 on a device. Seed 3.\n"
    )


@needs_matplotlib
def test_nothing_trained_has_no_curves(tmp_path):
    write_report(ROWS, [], tmp_path, device_name="a device", seed=0)
    assert not (tmp_path / "curves.png").exists()


def test_nothing_measured_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        write_report([], METRICS, tmp_path, device_name="a device", seed=0)


@pytest.fixture
def _without_matplotlib(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    plots.have_matplotlib.cache_clear()
    yield
    plots.have_matplotlib.cache_clear()


@pytest.mark.usefixtures("_without_matplotlib")
def test_without_matplotlib_there_are_tables_and_one_line_in_the_log(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        write_report(ROWS, METRICS, tmp_path, device_name="a device", seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.md"]
    assert [record.getMessage() for record in caplog.records] == [
        "no plots: matplotlib is missing; pip install 'timm-mamba-pkd[demo]' brings it"
    ]
