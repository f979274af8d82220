"""``mamba-pkd benchmark``: timm's columns, the same counts as everywhere, and errors before anything is measured."""

import csv

import pytest
import timm

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.models import count_macs
from timm_mamba_pkd.report import count_params

COLUMNS = [
    "model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "infer_gmacs",
    "infer_latency", "infer_peak_memory", "param_count",
]  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--amp"]])
def test_side_by_side(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("timm_mamba_pkd.runner.benchmark.measure_latency", lambda *args: 1.0)
    path = tmp_path / "new" / "costs.csv"
    names = ["mamba_pkd_s1", "test_resnet"]
    words = ["benchmark", *names, "--img-size", "24", "-b", "3", "--num-classes", "5", "--in-chans", "1"]
    assert main([*words, *flags, "--device", "cpu", "--results-file", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, row in zip(names, rows, strict=True):
        model = timm.create_model(name, in_chans=1, num_classes=5)
        assert list(row) == COLUMNS
        assert (row["model"], row["infer_batch_size"], row["infer_img_size"]) == (name, "3", "24")
        assert float(row["infer_gmacs"]) == count_macs(model, (1, 24, 24)) / 1e9
        assert float(row["param_count"]) == count_params(model) / 1e6
        assert float(row["infer_samples_per_sec"]) == pytest.approx(3000 / float(row["infer_step_time"]), rel=0.01)
        assert float(row["infer_peak_memory"]) > 4 * count_params(model) / 2**20 and float(row["infer_latency"]) > 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == COLUMNS and [line.split()[0] for line in out[1:3]] == names
    assert "1 MAC = 2 FLOPs" in out[-1] and "3 images a batch, on 1 CPU thread" in out[-1]


BAD = {
    "mamba_pkd_s1 resnet19": "unknown model 'resnet19'; known: resnet",
    "mamba_pkd_s1 --results-file old.csv": "--results-file old.csv exists already: name another, or move it away",
    "mamba_pkd_s1 --results-file old.csv/new.csv": "folder old.csv cannot be written: File exists",
    "mamba_pkd_s1 --results-file broken.csv": "--results-file broken.csv cannot be written: File exists",
    "mamba_pkd_s1 --results-file /proc/new/new.csv": "folder /proc/new cannot be written: ",
    f"mamba_pkd_s1 --results-file {300 * 'a'}": f"{300 * 'a'}: File name too long",
    f"mamba_pkd_s1 --results-file new/{251 * 'a'}.csv --img-size 4": "model mamba_pkd_s1 cannot be created: img_size",
    "nope mamba_pkd_s8": "unknown model 'nope'",
    "mamba_pkd_s8": "unknown model 'mamba_pkd_s8'; known: mamba_pkd_s7, mamba_pkd_s6, ",
    "mamba_pkd_s1 --results-file=": "--results-file must name a file, got ''",
    "mamba_pkd_s1 --results-file .": "--results-file must name a file, got '.'",
    "mamba_pkd_s1 --device gpu": "device gpu cannot be used: ",
    "mamba_pkd_s1 --img-size 4": "model mamba_pkd_s1 cannot be created: img_size must be at least 8",
    "mamba_pkd_s1 vit_tiny_patch16_224 --img-size 8": "model vit_tiny_patch16_224 cannot take images of 3x8x8: ",
    "local-dir:nowhere": "model local-dir:nowhere cannot be created: ",
}


def test_bad_input(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.csv").write_text("mine")
    (tmp_path / "broken.csv").symlink_to("nowhere/new.csv")
    monkeypatch.setattr("timm_mamba_pkd.runner.benchmark._measure", None)
    for words, message in BAD.items():
        assert main(["benchmark", *words.split()]) == 2, words
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert line.startswith(f"mamba-pkd: error: {message}"), line
        assert not out
    assert (tmp_path / "old.csv").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_a_model_that_cannot_be_measured(capsys):
    assert main(["benchmark", "mamba_pkd_s1", "--device", "meta", "--batch-size", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mamba-pkd: error: model mamba_pkd_s1 cannot be measured on meta: "), line
