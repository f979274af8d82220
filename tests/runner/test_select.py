"""``mamba-pkd select``: what it measures, what it writes, that what it says to run runs."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torchdistill.common.yaml_util import load_yaml_file

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.deploy import FORMATS
from timm_mamba_pkd.distillation import build_model
from timm_mamba_pkd.models import load_weights, save_weights
from timm_mamba_pkd.runner.config import prepare


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch):
    monkeypatch.setattr("timm_mamba_pkd.runner.select.measure_latency", lambda *args: 1.0)
    monkeypatch.setattr("timm_mamba_pkd.runner.export.median_time", lambda run, repeats: 1.0)
    monkeypatch.setattr("timm_mamba_pkd.report.selection_report.plot_selection", lambda *args: None)


def select(*words: Any) -> int:
    return main(["select", *map(str, words), "--device", "cpu"])


def answer(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    document = json.loads((folder / "select.json").read_text())
    return document, {candidate["name"]: candidate for candidate in document["candidates"]}


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr: one line."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("mamba-pkd: error: ")
    return line


def test_a_run(taught, capsys):
    """Every candidate's accuracy is that of its model on the validation split, and what it says to run, runs."""
    assert select(taught) == 0
    out = capsys.readouterr().out
    assert f"4 candidates on 12 samples of fake/val of {taught}/config.yaml\n" in out
    assert {path.name for path in (taught / "select").iterdir()} == {"select.json", "select.html"}
    document, found = answer(taught / "select")
    kinds = {name: candidate["kind"] for name, candidate in found.items()}
    assert kinds == {
        "test_resnet": "teacher", "mamba_pkd_s1": "student", "mamba_pkd_s2": "student",
        "ensemble_2": "ensemble",
    }  # fmt: skip
    assert document["samples"] == 12 and document["made_by"]["hardware"]["device"] == "cpu"

    job = prepare(taught / "config.yaml", torch.device("cpu"))
    load_weights(job.student, taught / "weights" / "ensemble.safetensors")
    ensemble: Any = job.student.eval()
    teacher: Any = job.teacher
    models = {"test_resnet": teacher.eval(), "mamba_pkd_s1": ensemble.students[0], "mamba_pkd_s2": ensemble.students[1]}
    models |= {"ensemble_2": ensemble}
    data = [job.datasets["fake/val"][i] for i in range(12)]
    x, labels = torch.stack([image for image, _ in data]), torch.tensor([label for _, label in data])
    with torch.no_grad():
        for name, model in models.items():
            accuracy = 100 * (model(x).argmax(-1) == labels).double().mean().item()
            assert found[name]["accuracy"] == pytest.approx(accuracy), name

    assert all(
        candidate["how"] in out.replace("\n  ", "\n") for candidate in found.values() if "front" in candidate["status"]
    )
    words = {name: shlex.split(found[name]["how"]) for name in ("mamba_pkd_s2", "ensemble_2")}
    assert main(words["ensemble_2"][1:]) == 0
    file = FORMATS["pt2"].open(taught / "export" / "ensemble_2.pt2")
    torch.testing.assert_close(file(x), ensemble(x), rtol=1e-4, atol=1e-5)
    assert main([*words["mamba_pkd_s2"][1:-1], "hf"]) == 0  # as above, but pt2 takes seconds
    loaded = timm.create_model("local-dir:run/export/mamba_pkd_s2", pretrained=True).eval()
    assert torch.equal(loaded(x), models["mamba_pkd_s2"](x))
    Path("teacher.yaml").write_text(found["test_resnet"]["how"])
    again = build_model(load_yaml_file("teacher.yaml")["models"]["model"]).eval()
    assert torch.equal(again(x), models["test_resnet"](x))


def test_named_models_beside_a_run(taught, capsys, build):
    """By checkpoint and from a folder, on the run's samples; what the first command says, runs."""
    model = build.weights(Path("three.safetensors"), "mamba_pkd_s1", img_size=8)
    torch.nn.init.normal_(model.head.fc.weight, std=9)  # of all classes, unlike the run's
    save_weights(model, Path("three.safetensors"))
    words = ["--num-classes", "3", "--in-chans", "1", "--img-size", "8"]
    named = ["export", "mamba_pkd_s1", "--checkpoint", "three.safetensors", *words]
    assert main([*named, "--format", "hf", "--output", "hub"]) == 0
    capsys.readouterr()
    named = ["mamba_pkd_s1=three.safetensors", "local-dir:hub/mamba_pkd_s1"]
    for words, name in ((named, "mamba_pkd_s1 #2"), (named[::-1], "local-dir:hub/mamba_pkd_s1")):
        assert select(taught, "--models", *words, "--output", name) == 0
        document, found = answer(Path(name))
        (other,) = {"mamba_pkd_s1 #2", "local-dir:hub/mamba_pkd_s1"} - {name}
        (note,) = document["notes"]
        assert note == f"{other} is left out: its predictions, MACs and parameters are those of {name}."
        assert capsys.readouterr().out.count(note) == 1
        assert found[name]["kind"] == "model" and other not in found
    one, other = (answer(Path(name))[1][name] for name in ("mamba_pkd_s1 #2", "local-dir:hub/mamba_pkd_s1"))
    assert one["accuracy"] == other["accuracy"]
    assert other["how"] == "mamba-pkd export local-dir:hub/mamba_pkd_s1 --img-size 8 --format pt2"
    assert main([*shlex.split(one["how"])[1:-1], "hf"]) == 0
    x = torch.randn(3, 1, 8, 8)
    loaded = timm.create_model("local-dir:runs/mamba_pkd_s1/export/mamba_pkd_s1", pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))


def test_a_model_for_other_images_is_told(taught, build, progressive, write, caplog):
    """A folder brings its mean and std along; those of the run's transforms are others."""
    build.weights(Path("three.safetensors"), "mamba_pkd_s1", img_size=8)
    words = ["--checkpoint", "three.safetensors", "--num-classes", "3", "--in-chans", "1", "--img-size", "8"]
    assert main(["export", "mamba_pkd_s1", *words, "--format", "hf", "--output", "hub"]) == 0
    normalize = build.call("torchvision.transforms.Normalize", mean=[0.25], std=[0.125])
    steps = [build.call("torchvision.transforms.ToTensor"), normalize]
    both = build.call("torchvision.transforms.Compose", transforms=steps)
    for split in progressive["datasets"].values():
        split["init"]["kwargs"]["transform"] = both
    shutil.copy(write(progressive), taught / "config.yaml")
    assert select(taught, "--models", "local-dir:hub/mamba_pkd_s1") == 0
    own = "local-dir:hub/mamba_pkd_s1 is made for images of mean "
    assert own in caplog.text and "those of fake/val of run/config.yaml are of [0.25]" in caplog.text


def test_named_models_on_images(images, tmp_path, monkeypatch, build):
    """As evaluate --model sees them; 12 images, some of them large."""
    monkeypatch.chdir(tmp_path)
    folder = images("a", "b", "c", size=40)
    build.weights(Path("one.safetensors"), "mamba_pkd_s1")
    build.weights(Path("two.safetensors"), "test_resnet")
    pool = ["--models", "mamba_pkd_s1=one.safetensors", "test_resnet=two.safetensors"]
    assert select(*pool, "--data-root", folder, "--mean", "0.4", "-j", "0") == 0
    document, found = answer(Path("runs/select"))
    assert document["samples"] == 12
    for name, file in (("mamba_pkd_s1", "one"), ("test_resnet", "two")):
        words = ["--checkpoint", f"{file}.safetensors", "--data-root", str(folder), "--mean", "0.4", "-j", "0"]
        printed: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr("builtins.print", lambda *args, printed=printed, **kwargs: printed.append(str(args[0])))
            assert main(["evaluate", "--model", name, *words, "--device", "cpu"]) == 0
        assert f"Acc@1 {found[name]['accuracy']:.2f}" in printed[0]


def test_a_run_on_images(taught, images):
    """The run's own transforms, and its models beside named ones."""
    folder = images("a", "b", "c")
    shutil.copy(taught / "weights" / "1_mamba_pkd_s1.safetensors", "same.safetensors")
    pool = [taught, "--models", "mamba_pkd_s1=same.safetensors", "--data-root", folder, "-j", "0"]
    assert select(*pool, "--output", "out") == 0
    document, found = answer(Path("out"))
    assert document["samples"] == 12 and document["samples_of"] == f"{folder} (validation)"
    assert set(found) == {"test_resnet", "mamba_pkd_s1", "mamba_pkd_s2", "ensemble_2"}  # what says the same is one
    assert document["notes"][0].startswith("mamba_pkd_s1 #2 is left out: ")


def test_two_runs(progressive, plain, run, build, capsys, tmp_path, monkeypatch):
    """The same validation split: one pool. Another: one line."""
    monkeypatch.chdir(tmp_path)
    assert run(progressive, output="one")[0] == 0 and run(plain, output="two")[0] == 0
    plain["datasets"]["fake/val"] = build.fake_images(12, offset=333)
    assert run(plain, output="three")[0] == 0
    capsys.readouterr()
    assert select("one", "two", "--output", "out") == 0
    _, found = answer(Path("out"))
    names = {"one/mamba_pkd_s1", "one/mamba_pkd_s2", "one/ensemble_2", "two/mamba_pkd_s1"}
    assert set(found) == names
    assert found["two/mamba_pkd_s1"]["how"] == "mamba-pkd export two --format pt2"
    capsys.readouterr()
    assert select("one", "three") == 2
    assert "fake/val of three/config.yaml and fake/val of one/config.yaml are not the same samples" in error(capsys)


def test_nothing_fits(taught, capsys):
    assert select(taught, "--max-macs", "0.001", "--min-accuracy", "0", "--safe-config") == 1
    out = capsys.readouterr().out
    assert "Nothing keeps the constraints. The nearest miss:" in out
    assert re.search(r"mamba_pkd_s1.*  \d+ % above --max-macs 0.001\n", out)
    document, _ = answer(taught / "select")
    assert document["front"] == [] and document["nearest_miss"]["name"] == "mamba_pkd_s1"


def test_a_teacher_that_is_gone_is_left_out(taught, capsys, caplog):
    Path("teacher.safetensors").unlink()
    assert select(taught) == 0
    assert "The teacher of run/config.yaml is left out: weights file teacher.safetensors does not exist" in caplog.text
    assert "test_resnet" not in answer(taught / "select")[1]


def test_a_student_of_another_pooling(progressive, taught, write, capsys):
    """Its command makes a model that computes what the student does in the ensemble."""
    progressive["models"]["student_model"]["kwargs"]["global_pool"] = "max"
    shutil.copy(write(progressive), taught / "config.yaml")
    assert select(taught) == 0
    _, found = answer(taught / "select")
    words = shlex.split(found["mamba_pkd_s2"]["how"])
    assert main([*words[1:-1], "hf"]) == 0
    loaded: Any = timm.create_model("local-dir:run/export/mamba_pkd_s2", pretrained=True).eval()
    job = prepare(taught / "config.yaml", torch.device("cpu"))
    load_weights(job.student, taught / "weights" / "ensemble.safetensors")
    ensemble: Any = job.student.eval()
    x = torch.rand(5, 1, 16, 16)  # of 8 pixels one is left, whose mean is its maximum
    assert torch.equal(loaded(x), ensemble.students[1](x))
    ensemble.reset_classifier(3, "avg")
    load_weights(ensemble, taught / "weights" / "ensemble.safetensors")
    assert not torch.allclose(loaded(x), ensemble.students[1](x))


def test_an_ensemble_by_its_weights(taught, capsys, errors):
    """The line that refuses it says which command makes a folder of it, which is taken."""
    named = "mamba_pkd_ensemble=run/weights/ensemble.safetensors"
    assert select(taught, "--models", named) == 2
    (line,) = errors()
    assert line.startswith("weights file run/weights/ensemble.safetensors is of another model than MambaPKDEnsemble: ")
    command = line[line.index("mamba-pkd export") : line.index(" writes")].replace("'...'", "'mamba_pkd_s2'")
    sizes = ["--num-classes", "3", "--in-chans", "1", "--img-size", "8"]
    assert main([*shlex.split(command)[1:], *sizes, "--output", "hub"]) == 0
    assert select(taught, "--models", "local-dir:hub/mamba_pkd_ensemble_2") == 0
    (note,) = answer(taught / "select")[0]["notes"]
    assert note.endswith("ensemble_2 is left out: its predictions, MACs and parameters are those of ensemble_2.")


PROPOSE = """
import torch

class Both(torch.nn.Module):
    def __init__(self, models):
        super().__init__()
        self.models = torch.nn.ModuleList(models)

    def forward(self, x):
        return sum(model(x) for model in self.models)

def both(models, table):
    assert [candidate.name for candidate in table.candidates] == list(models)
    return {"both": Both([models["mamba_pkd_s1"], models["test_resnet"]])}

def nothing(models, table):
    return {}

def wrong(models, table):
    return {"ensemble_2": models["ensemble_2"]}

def fails(models, table):
    raise KeyError("x")

class Fails(torch.nn.Module):
    def forward(self, x):
        if len(x) > 1:
            raise IndexError("too many images")
        return torch.zeros(len(x), 3)

class OneImage(torch.nn.Module):
    def forward(self, x):
        return torch.zeros(1, 3)

def later(models, table):
    return {"later": Fails()}

def one(models, table):
    return {"one": OneImage()}

def spoils(models, table):
    for model in models.values():
        model.train().requires_grad_(False)
        for parameter in model.parameters():
            parameter.zero_()
    return {"small": OneImage()} if "small" in models else {}

number = 3
"""


def test_propose(taught, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    Path("my_proposals.py").write_text(PROPOSE)
    assert select(taught, "--propose", "my_proposals:both", "--output", "out") == 0
    _, found = answer(Path("out"))
    assert found["both"]["kind"] == "proposed" and found["both"]["how"]
    parts = [found["mamba_pkd_s1"], found["test_resnet"]]
    assert found["both"]["macs"] == pytest.approx(sum(part["macs"] for part in parts))
    assert select(taught, "--propose", "my_proposals:nothing", "--output", "out") == 0
    earlier, of_earlier = answer(Path("out/old-1"))
    assert of_earlier.keys() == found.keys() and earlier["made_by"] != answer(Path("out"))[0]["made_by"]
    assert f"what was there before: {Path('out/old-1')}" in capsys.readouterr().out
    assert select(taught, "--propose", "my_proposals:spoils", "--output", "again") == 0
    spoiled = answer(Path("again"))[1]
    assert {name: one["accuracy"] for name, one in spoiled.items()} == {
        name: found[name]["accuracy"] for name in spoiled
    }
    capsys.readouterr()
    for name, message in {
        "my_proposals:wrong": "must return a dictionary of new names and torch modules",
        "my_proposals:fails": "--propose my_proposals:fails raised KeyError: 'x'",
        "my_proposals:number": "is no function",
        "my_proposals:later": "later cannot be measured on cpu: too many images",
        "my_proposals:one": "one must return logits (8, classes) for 8 images, got (1, 3)",
        "my_proposals:absent": "must be MODULE:FUNCTION of a module that can be imported",
        "my_proposals": "--propose my_proposals must be MODULE:FUNCTION",
        "no_such_module:f": "must be MODULE:FUNCTION of a module that can be imported",
    }.items():
        assert select(taught, "--propose", name, "--output", "new") == 2
        assert message in error(capsys)
    assert select(taught, "--propose", "my_proposals:both", "--safe-config") == 2
    assert "--safe-config refuses" in error(capsys)
