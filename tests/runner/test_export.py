"""``mamba-pkd export``: its files compute what the model does, its lines say so, and its errors come first."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf
from torch import nn

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.deploy import FORMATS
from timm_mamba_pkd.models import Confidence, load_weights, save_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NEEDS_ONNX = pytest.mark.skipif(bool(FORMATS["onnx"].missing()), reason="ONNX's packages are not installed")
SMALL = ["--in-chans", "1", "--num-classes", "3", "--img-size", "8"]


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch):
    monkeypatch.setattr("timm_mamba_pkd.runner.export.median_time", lambda run, repeats: 1.0)


def trained(path: Path, **kwargs) -> Any:
    """A student with weights that give large logits, and the file of these weights."""
    torch.manual_seed(0)
    model: Any = timm.create_model("mamba_pkd_s1", **{"num_classes": 3, "in_chans": 1, "img_size": 8, **kwargs})
    nn.init.normal_(model.head.fc.weight)
    save_weights(model, path)
    return model.eval()


@NEEDS_ONNX
def test_run_folder(progressive, run, capsys):
    """Files of the ensemble after one student, with int8 weights, too, and a folder of the whole one."""
    code, folder = run(progressive)
    assert code == 0
    capsys.readouterr()
    assert main(["export", str(folder), "--students", "1", "--int8"]) == 0
    out = capsys.readouterr().out
    number = r"\d\.\de-\d\d"
    same = rf"largest difference {number} \(random\), {number} \(test images\)"
    same += "  1 ms an image, 1.0 times as fast as eager"
    size = r"[\d.]+ [kM]B"
    top1 = r"top-1 \d+\.\d\d instead of \d+\.\d\d %"
    line = [rf"{re.escape(str(folder))}/export/ensemble_1{end}" for end in (r"\.onnx", r"\.int8\.onnx", r"\.pt2")]
    expected = [r"ensemble_1: 1 ms an image in eager PyTorch, \d+ CPU threads?"]
    expected += [f"{line[0]}  {size}  {same}", f"{line[1]}  {size}  {same}  {top1}", f"{line[2]}  {size}  {same}"]
    assert re.fullmatch("\n".join(expected) + "\n", out), out
    assert sorted(path.name for path in (folder / "export").iterdir()) == [
        "ensemble_1.int8.onnx", "ensemble_1.onnx", "ensemble_1.pt2",
    ]  # fmt: skip

    students = ["mamba_pkd_s1", "mamba_pkd_s2"]
    kwargs: Any = {"students": students, "num_classes": 3, "in_chans": 1, "img_size": 8}
    ensemble: Any = timm.create_model("mamba_pkd_ensemble", **kwargs).eval()
    load_weights(ensemble, folder / "weights" / "ensemble.safetensors")
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        for kind in ("onnx", "pt2"):
            path = folder / "export" / f"ensemble_1{FORMATS[kind].suffix}"
            torch.testing.assert_close(FORMATS[kind].open(path)(x), ensemble.first(1)(x), rtol=1e-4, atol=1e-5)

        ensemble.policy = Confidence([0.4], [1.0, 2.0])
        save_weights(ensemble, folder / "weights" / "ensemble.safetensors")
        (folder / "calibration").mkdir()
        (folder / "calibration" / "calibration.md").write_text("It saves half.\n")
        assert main(["export", str(folder), "--format", "hf"]) == 0
        loaded: Any = timm.create_model(f"local-dir:{folder}/export/ensemble_2", pretrained=True).eval()
        assert torch.equal(loaded(x), ensemble(x))
        assert torch.equal(loaded.predict(x).logits, ensemble.predict(x).logits)
        assert main(["export", str(folder), "--format", "hf", "--students", "1"]) == 0
    measured = [
        "It saves half." in (folder / "export" / name / "README.md").read_text()
        for name in ("ensemble_1", "ensemble_2")
    ]
    assert measured == [False, True]  # it was measured with all
    assert resolve_data_config(model=loaded)["mean"] == [0.0]  # the transforms end with ToTensor
    card = (folder / "export" / "ensemble_2" / "README.md").read_text()
    today = json.loads((folder / "run.json").read_text())["starts"][0]["time"][:10]
    assert f"The run that this model is of, begun on {today}, " in card
    assert (folder / "results.md").read_text().strip() in card
    assert (folder / "config.yaml").read_text().strip() in card
    assert "`mamba-pkd train --config config.yaml --seed 42 --model-ema-decay 0.9998 --on-nonfinite stop`" in card
    assert "- `fake/test`: 21 images of `torchvision.datasets.fakedata.FakeData`" in card


def test_named_model(tmp_path, capsys, caplog, monkeypatch):
    """Weights of a file, on the digits; then from the folder that it left, and in the default one."""
    monkeypatch.chdir(tmp_path)
    model = trained(tmp_path / "weights.safetensors")
    words = ["export", "mamba_pkd_s1", "--checkpoint", "weights.safetensors", *SMALL]
    assert main([*words, "--format", "hf", "--output", "out"]) == 0
    assert re.search(r"\nout/mamba_pkd_s1  .* 0.0e\+00 \(digits\)\n", capsys.readouterr().out)
    (warning,) = [record.message for record in caplog.records if record.name.startswith("timm_mamba_pkd")]
    assert "default mean and std of mamba_pkd_s1" in warning and "--config" in warning
    assert "Results" not in (tmp_path / "out" / "mamba_pkd_s1" / "README.md").read_text()
    assert main(["export", "local-dir:out/mamba_pkd_s1", "--format", "pt2"]) == 0
    run = FORMATS["pt2"].open(tmp_path / "runs" / "mamba_pkd_s1" / "export" / "mamba_pkd_s1.pt2")
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


def test_sizes_and_images_of_a_config(plain, write, tmp_path, capsys, caplog):
    trained(tmp_path / "weights.safetensors")
    words = ["export", "mamba_pkd_s1", "--checkpoint", str(tmp_path / "weights.safetensors"), "--format", "hf"]
    assert main([*words, "--config", str(write(plain)), "--output", str(tmp_path / "out")]) == 0
    assert "(test images)" in capsys.readouterr().out and "mean and std" not in caplog.text


def test_random_weights_are_said_to_be_random(tmp_path, caplog):
    assert main(["export", "mamba_pkd_s1", "--format", "hf", "--output", str(tmp_path / "out"), *SMALL]) == 0
    assert "mamba_pkd_s1 is exported with random weights" in caplog.text


def test_a_file_that_computes_something_else_is_not_left(tmp_path, capsys, monkeypatch):
    wrong = FORMATS["pt2"]._replace(
        write=lambda model, images, path: path.touch(), open=lambda path: lambda x: torch.full((len(x), 3), torch.nan)
    )
    monkeypatch.setitem(FORMATS, "pt2", wrong)
    (tmp_path / "old").mkdir()
    for folder in ("old", "new/out"):
        assert main(["export", "mamba_pkd_s1", "--format", "pt2", "--output", str(tmp_path / folder), *SMALL]) == 2
        assert "mamba_pkd_s1 differs from eager PyTorch by nan on random: not written" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


@pytest.mark.parametrize("kind", ["nan", "int64", "truncated"])
def test_damaged_weights(kind, plain, write, tmp_path, capsys):
    """One line, for a file and for a folder, before anything is written."""
    state = trained(tmp_path / "weights.safetensors").state_dict()
    damaged = state["norm.weight"] * torch.nan if kind == "nan" else state["norm.weight"].long()
    torch.save({**state, "norm.weight": damaged}, tmp_path / "weights.pth")
    if kind == "truncated":
        (tmp_path / "weights.pth").write_bytes((tmp_path / "weights.pth").read_bytes()[:1000])
    save_for_hf(trained(tmp_path / "weights.safetensors"), str(tmp_path / "folder"))
    shutil.copy(tmp_path / "weights.pth", tmp_path / "folder" / "pytorch_model.bin")
    config = str(write(plain))
    before = sorted(tmp_path.rglob("*"))
    message = {"nan": "not finite: norm.weight", "int64": "dtype of norm.weight torch.int64", "truncated": ""}[kind]
    for words in (
        ["export", "mamba_pkd_s1", *SMALL, "--checkpoint", str(tmp_path / "weights.pth")],
        ["export", f"local-dir:{tmp_path / 'folder'}"],
        ["evaluate", "--config", config, "--device", "cpu", "--checkpoint", str(tmp_path / "weights.pth")],
    ):
        output = ["--output", str(tmp_path / "out")]
        assert main([*words, *output]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and str(tmp_path) in line, line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("scale", "code"), [(1e-3, 2), (1e-5, 0)])
def test_the_tolerance_follows_the_logits(scale, code, tmp_path, capsys, monkeypatch):
    """Small ones may differ by as small a share; zeros are compared with zeros."""
    model = trained(tmp_path / "weights.safetensors")
    for head in (0.001, 0.0):
        nn.init.constant_(model.head.fc.bias, 0.0)
        model.head.fc.weight.data *= head
        save_weights(model, tmp_path / "weights.safetensors")
        other = lambda path, model=model: lambda x: model(x) * (1 + scale)  # noqa: E731
        monkeypatch.setitem(FORMATS, "pt2", FORMATS["pt2"]._replace(write=lambda *args: args[2].touch(), open=other))
        words = ["export", "mamba_pkd_s1", "--checkpoint", str(tmp_path / "weights.safetensors"), *SMALL]
        assert main([*words, "--format", "pt2", "--output", str(tmp_path / f"{head}")]) == (code if head else 0)
    assert ("differs from eager PyTorch" in capsys.readouterr().err) == (code == 2)


def test_missing_packages(capsys, monkeypatch):
    monkeypatch.setattr("timm_mamba_pkd.deploy.formats.find_spec", lambda name: None)
    for kind, wanted in (
        ("onnx", "onnx, onnxscript, onnxruntime: pip install 'timm_mamba_pkd[onnx]'"),
        ("cascade", "onnx, onnxscript, onnxruntime: pip install 'timm_mamba_pkd[onnx]'"),
        ("executorch", "executorch: pip install executorch"),
    ):
        assert main(["export", "mamba_pkd_s1", "--format", kind]) == 2
        assert capsys.readouterr().err == f"mamba-pkd: error: --format {kind} needs {wanted}\n"


def test_packages_that_cannot_be_imported(tmp_path, capsys, monkeypatch):
    """One line before anything is made; also where a runtime fails only as it opens the file."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_runtime.py").write_text("raise ImportError('numpy.core.multiarray failed\\nto import')")
    broken = FORMATS["pt2"]._replace(packages=("broken_runtime",))
    monkeypatch.setitem(FORMATS, "pt2", broken)
    words = ["export", "mamba_pkd_s1", "--format", "pt2", *SMALL, "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "mamba-pkd: error: --format pt2 needs broken_runtime, whose import fails (numpy.core.multiarray failed): "
        "install it anew with pip install --force-reinstall broken_runtime\n"
    )

    def fails(path: Path) -> Any:
        raise ImportError("no runtime")

    monkeypatch.setitem(FORMATS, "pt2", broken._replace(packages=(), write=lambda *args: None, open=fails))
    assert main(words) == 2
    assert capsys.readouterr().err == "mamba-pkd: error: mamba_pkd_s1 cannot be exported as pt2: no runtime\n"
    assert not (tmp_path / "out").exists()


BAD = {
    "nothing": "nothing is neither a model of timm nor the folder of a run: unknown model 'nothing'; known: ",
    "mamba_pkd_s8": "mamba_pkd_s8 is neither a model of timm nor the folder of a run: unknown model 'mamba_pkd_s8'; "
    "known: mamba_pkd_s7, ",
    "nowhere/run": "nowhere/run is neither a model of timm nor the folder of a run (no config.yaml in it)",
    "empty": "empty is neither a model of timm nor the folder of a run (no config.yaml in it)",
    "local-dir:empty": "model local-dir:empty cannot be created: ",
    "local-dir:empty --num-classes 5": "--num-classes and --in-chans are those of local-dir:empty: leave them out",
    "mamba_pkd_s1 --img-size 7": "model mamba_pkd_s1 cannot be created: img_size must be at least 8",
    "mamba_pkd_s1 --students 1": "--students is for ensembles, and mamba_pkd_s1 is none",
    "mamba_pkd_s1 --model-kwargs num_classes=3": "--model-kwargs num_classes has a flag of its own: --num-classes",
    "mamba_pkd_s1 --model-kwargs checkpoint_path=five.pt": "--model-kwargs checkpoint_path has a flag of its own: "
    "--checkpoint",
    "mamba_pkd_s1 --model-kwargs pretrained=True": "--model-kwargs pretrained is what a tag stands for: name ",
    "mamba_pkd_s1 --model-kwargs features_only=True": "--model-kwargs features_only makes no classifier: leave it out",
    "mamba_pkd_s1 --model-kwargs students=3": "model mamba_pkd_s1 cannot be created: MambaPKD has no parameter ",
    "mamba_pkd_s1 --model-kwargs exportable=True": "model mamba_pkd_s1 cannot be created: TypeError: ",
    "local-dir:empty --model-kwargs a=1": "--model-kwargs are those of local-dir:empty: leave them out",
    "run --model-kwargs a=1": "--model-kwargs are those of the run in run: leave them out",
    "mamba_pkd_ensemble --students 0": "--students must be from 1 to 7, got 0",
    "mamba_pkd_ensemble --students 8": "--students must be from 1 to 7, got 8",
    "mamba_pkd_s1 --checkpoint nowhere.pt": "weights file nowhere.pt does not exist",
    "mamba_pkd_s1 --checkpoint five.safetensors": "weights file five.safetensors is of another model than MambaPKD: "
    "shape of head.fc.weight (5, 32) instead of (1000, 32)",
    "mamba_pkd_s1 --config nowhere.yaml": "config nowhere.yaml cannot be read: No such file or directory",
    "mamba_pkd_s1 --config a.yaml --img-size 8": "--img-size is that of --config a.yaml: leave it out",
    "mamba_pkd_s1 --int8": "--int8 is for ONNX: add onnx to --format",
    "mamba_pkd_s1 --output file": "folder file cannot be written: File exists",
    f"mamba_pkd_s1 --output {300 * 'a'}": f"{300 * 'a'}/mamba_pkd_s1.pt2: File name too long",
    f"{300 * 'a'}": f"{300 * 'a'}: File name too long",
    "mamba_pkd_s1 --output out": "out/mamba_pkd_s1.pt2 exists already: choose another --output, or move it away",
    "run --num-classes 3": "--num-classes is that of the run in run: leave it out",
    "run --config a.yaml": "--config is that of the run in run: leave it out",
    "run": "weights file run/weights/model.safetensors does not exist",
    "run --format hf --checkpoint three.safetensors": "the run in run has not finished: the same mamba-pkd train",
}


def test_bad_input(plain, write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "run", "out"):
        Path(folder).mkdir()
    write(plain, "run/config.yaml")
    trained(Path("three.safetensors"))
    trained(Path("five.safetensors"), num_classes=5, in_chans=3)
    Path("out/mamba_pkd_s1.pt2").touch()
    Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    for words, message in BAD.items():
        kind = [] if "--format" in words else ["--format", "pt2"]
        assert main(["export", *words.split(), *kind]) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"mamba-pkd: error: {message}"), line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["pt2", "hf"])
def test_what_another_export_has_written_meanwhile_stays(kind, tmp_path, capsys, monkeypatch):
    path = tmp_path / "out" / {"pt2": "mamba_pkd_s1.pt2", "hf": "mamba_pkd_s1"}[kind]
    theirs = path / "config.json" if kind == "hf" else path

    def meanwhile(*args: Any) -> str:
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("theirs")
        return ""

    monkeypatch.setattr("timm_mamba_pkd.runner.export.differences", meanwhile)
    assert main(["export", "mamba_pkd_s1", "--format", kind, "--output", str(tmp_path / "out"), *SMALL]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"mamba-pkd: error: {path}: ") and theirs.read_text() == "theirs"
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [theirs]


def test_students_of_a_student_are_refused_before_its_weights_are(caplog):
    assert main(["export", "mamba_pkd_s1", "--students", "2", "--format", "pt2"]) == 2
    assert "random weights" not in caplog.text


def test_students_that_are_not_active_are_not_exported(tmp_path, capsys):
    ensemble: Any = timm.create_model("mamba_pkd_ensemble", students=["mamba_pkd_s1", "mamba_pkd_s2"], num_classes=3)
    ensemble.set_active([1])
    save_for_hf(ensemble, str(tmp_path / "second"), safe_serialization=True)
    model = f"local-dir:{tmp_path / 'second'}"
    for flags, k in (([], 1), (["--students", "2"], 2)):
        assert main(["export", model, "--format", "pt2", "--output", str(tmp_path / "out"), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"mamba-pkd: error: students 1 to {k} cannot be exported: only 2 of {model} are trained and active"
        )


@NEEDS_ONNX
def test_int8_needs_labels(capsys):
    assert main(["export", "mamba_pkd_s1", "--int8"]) == 2
    assert "--int8 measures the accuracy on labelled data: name a config" in capsys.readouterr().err
