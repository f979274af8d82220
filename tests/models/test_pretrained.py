"""The weights in the package, as timm's pretrained tags: nothing is downloaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import timm_mamba_pkd
from timm_mamba_pkd.cli import main
from timm_mamba_pkd.deploy import sections_of_tag
from timm_mamba_pkd.models import STUDENTS, save_weights
from timm_mamba_pkd.report.table import Row, read_csv, to_markdown

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = Path(timm_mamba_pkd.__file__).parent / "weights"
DATASETS = [path.stem for path in sorted(WEIGHTS.glob("*.safetensors"))]


def create(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def recipe(dataset: str) -> str:
    """The config of the run that the weights are of."""
    if dataset == "mnist":
        return (ROOT / "yaml_configs" / "mnist" / "progressive.yaml").read_text()
    script = ROOT / "benchmarks" / "accuracy" / "image_folder.py"
    config = ROOT / "yaml_configs" / "cifar10" / "progressive_independent.yaml"
    words = [sys.executable, str(script), str(config), "./resource/dataset/cifar10-jpeg"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def results(dataset: str) -> list[Row]:
    return read_csv(ROOT / "benchmarks" / "accuracy" / dataset / "results.csv")


def images(model: Any) -> Tensor:
    return torch.randn(3, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))


def test_what_there_is():
    tags = {f"{name}.{dataset}" for name in [*STUDENTS, "mamba_pkd_ensemble"] for dataset in DATASETS}
    assert DATASETS and set(timm.list_pretrained("mamba_pkd*")) == tags
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 12e6


@pytest.mark.parametrize("dataset", DATASETS)
def test_students_and_ensemble_are_of_one_file(dataset):
    ensemble = create(f"mamba_pkd_ensemble.{dataset}")
    state, saved = ensemble.state_dict(), load_file(WEIGHTS / f"{dataset}.safetensors")
    assert state.keys() == saved.keys() and ensemble.names == tuple(STUDENTS) and ensemble.num_active == len(STUDENTS)
    for name, tensor in state.items():
        assert torch.equal(tensor, saved[name].to(tensor.dtype)), name
    x = images(ensemble)
    assert tuple(ensemble.img_size) == x.shape[2:]
    with torch.inference_mode():
        for name, logits in zip(STUDENTS, ensemble.run(x), strict=True):
            student = create(f"{name}.{dataset}")
            assert next(student.parameters()).dtype == torch.float32 and tuple(student.img_size) == x.shape[2:]
            assert student.num_classes == logits.shape[1] == ensemble.num_classes
            torch.testing.assert_close(student(x), logits)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("name", ["mamba_pkd_s1", "mamba_pkd_ensemble"])
def test_what_cards_say_is_what_was_measured(name, dataset):
    sections = sections_of_tag(timm.create_model(f"{name}.{dataset}"))
    assert list(sections) == ["Results", "Data", "Recipe"]
    assert to_markdown(results(dataset)).strip() in sections["Results"]
    assert "torchvision.datasets" in sections["Data"] and "Subset" not in sections["Data"]
    assert f"```yaml\n{recipe(dataset).strip()}\n```" in sections["Recipe"]
    assert sections_of_tag(timm.create_model(name)) == {}


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("name", ["mamba_pkd_s1", "mamba_pkd_ensemble"])
def test_another_class_count(name, dataset):
    own, other = create(f"{name}.{dataset}"), create(f"{name}.{dataset}", num_classes=3)
    kept = {key for key in own.state_dict() if "fc" not in key and not key.startswith("policy.") and key != "weights"}
    assert kept < other.state_dict().keys()
    assert all(torch.equal(own.state_dict()[key], other.state_dict()[key]) for key in kept)
    assert other(images(own)).shape == (3, 3)


@pytest.mark.parametrize("name", ["mamba_pkd_s1.mnist", "mamba_pkd_ensemble.mnist"])
def test_colour_images(name):
    grey, colour = create(name), create(name, in_chans=3)
    x = images(grey)
    torch.testing.assert_close(
        colour(x.expand(-1, 3, -1, -1)), grey(x), rtol=0.01, atol=0.01
    )  # timm divides the halves by 3


def test_students_of_an_ensemble_take_colour_images_as_they_do_alone():
    ensemble, x = create("mamba_pkd_ensemble.mnist", in_chans=3, num_classes=3), torch.randn(2, 3, 28, 28)
    for name, student in zip(STUDENTS, ensemble.students, strict=True):
        alone = create(f"{name}.mnist", in_chans=3)
        torch.testing.assert_close(student.forward_features(x), alone.forward_features(x), rtol=0, atol=0)
    assert ensemble(x).shape == (2, 3)
    assert create("mamba_pkd_ensemble.mnist", in_chans=3).predict(x).logits.shape == (2, 10)


def test_other_students_than_the_weights_are_of():
    with pytest.raises(RuntimeError) as error:
        create("mamba_pkd_ensemble.mnist", students=["mamba_pkd_s1", "mamba_pkd_s2"])
    assert str(error.value) == (
        "the weights of mamba_pkd_ensemble.mnist are of 7 students, mamba_pkd_s1, mamba_pkd_s2, mamba_pkd_s3, "
        "mamba_pkd_s4, mamba_pkd_s5, mamba_pkd_s6, mamba_pkd_s7, not of mamba_pkd_s1, mamba_pkd_s2"
    )


def test_the_default_is_untrained():
    model: Any = timm.create_model("mamba_pkd_s1", device="meta")
    assert model.pretrained_cfg["tag"] == "untrained"
    with pytest.raises(RuntimeError, match="No pretrained weights exist for mamba_pkd_s1"):
        create("mamba_pkd_s1")


@pytest.mark.parametrize("name", ["mamba_pkd_s1", "mamba_pkd_s3"])
@pytest.mark.parametrize(
    ("dataset", "folder", "flags", "tolerance"),
    [
        ("mnist", "data_root", ["--dataset", "torch/mnist", "--split", "validation"], 0.05),
        ("cifar10", "cifar10_jpeg", ["--split", "test"], 0.1),
    ],
)
def test_accuracy(name, dataset, folder, flags, tolerance, request, capsys):
    """As `benchmarks/accuracy` says, but for half precision and, on CIFAR-10, bfloat16."""
    claimed = next(line.top1 for line in results(dataset) if line.model == name)
    words = ["--data-root", str(request.getfixturevalue(folder)), *flags, "--workers", "0", "--batch-size", "500"]
    assert main(["evaluate", "--model", f"{name}.{dataset}", *words, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert float(out.split("Acc@1 ")[1].split()[0]) == pytest.approx(claimed, abs=tolerance)


def test_export_and_select_take_them(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "mamba_pkd_s1.mnist", "--format", "hf"]) == 0 and not caplog.records
    loaded = timm.create_model("local-dir:runs/mamba_pkd_s1.mnist/export/mamba_pkd_s1.mnist", pretrained=True).eval()
    card = Path("runs/mamba_pkd_s1.mnist/export/mamba_pkd_s1.mnist/README.md").read_text()
    s1 = next(line for line in to_markdown(results("mnist")).splitlines() if line.startswith("| mamba_pkd_s1 |"))
    assert "\n## Results\n" in card and s1 in card and "\nThe run that this model is of, begun on 20" in card
    assert "\n## Data\n\n- `mnist/train`: 55000 images" in card and "\n## Recipe\n" in card
    own = create("mamba_pkd_s1.mnist")
    save_weights(own, "own.safetensors")
    words = ["--checkpoint", "own.safetensors", "--num-classes", "10", "--in-chans", "1", "--format", "hf"]
    assert main(["export", "mamba_pkd_s1.mnist", *words, "--output", "other"]) == 0
    assert "Results" not in Path("other/mamba_pkd_s1.mnist/README.md").read_text()  # the file may be of any run
    torch.testing.assert_close(loaded(images(own)), own(images(own)))
    for label in range(2):
        (tmp_path / "data" / "val" / str(label)).mkdir(parents=True)
        Image.new("L", (28, 28), 100 * label).save(tmp_path / "data" / "val" / str(label) / "0.png")
    names = ["mamba_pkd_s1.mnist", "mamba_pkd_s2.mnist"]
    assert main(["select", "--models", *names, "--data-root", "data", "-j", "0", "--output", "out"]) == 0
    candidates = json.loads((tmp_path / "out" / "select.json").read_text())["candidates"]
    assert [candidate["name"] for candidate in candidates] == names
