"""``mamba-pkd select``: what it measures, what it writes, that what it says to run runs, and its errors."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from torchdistill.common.yaml_util import load_yaml_file

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.deploy import FORMATS
from timm_mamba_pkd.distillation import build_model
from timm_mamba_pkd.models import Confidence, count_macs, load_weights, save_weights
from timm_mamba_pkd.runner import pool
from timm_mamba_pkd.runner import select as selecting
from timm_mamba_pkd.runner.config import prepare
from timm_mamba_pkd.runner.run_folder import RunFolder
from timm_mamba_pkd.runner.unreadable import Readable

SIZES: dict[str, Any] = {"num_classes": 3, "in_chans": 1}


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch):
    monkeypatch.setattr("timm_mamba_pkd.runner.select.measure_latency", lambda *args: 1.0)
    monkeypatch.setattr("timm_mamba_pkd.runner.export.median_time", lambda run, repeats: 1.0)
    monkeypatch.setattr("timm_mamba_pkd.report.selection_report.plot_selection", lambda *args: None)


def weights(path: Path, name: str, seed: int = 0, **kwargs: Any) -> Any:
    """A model of timm whose predictions differ from image to image, and the file of its weights."""
    torch.manual_seed(seed)
    model: Any = timm.create_model(name, **{**SIZES, **kwargs})
    nn.init.normal_(model.get_classifier().weight)
    save_weights(model, path)
    return model.eval()


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Where the run of `trained` is kept from test to test."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def trained(progressive, run, kept, tmp_path, capsys, monkeypatch) -> Path:
    """The folder of a run: students s1 and s2 of a teacher with weights."""
    monkeypatch.chdir(tmp_path)
    progressive["models"]["teacher_model"]["src_ckpt"] = "teacher.safetensors"
    if not (kept / "run").exists():
        weights(kept / "teacher.safetensors", "test_resnet")
        shutil.copy(kept / "teacher.safetensors", tmp_path)
        assert run(progressive)[0] == 0
        shutil.copytree("run", kept / "run")
        shutil.rmtree("run")
        capsys.readouterr()
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    return Path("run")


@pytest.fixture
def images(tmp_path) -> Callable[..., Path]:
    """A folder of noisy grey images, a folder for each class."""

    def images(*classes: str, size: int = 8, count: int = 4) -> Path:
        torch.manual_seed(1)
        for label in classes:
            folder = tmp_path / "images" / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (size, size), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        return tmp_path / "images"

    return images


def select(*words: Any) -> int:
    return main(["select", *map(str, words), "--device", "cpu"])


def answer(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    document = json.loads((folder / "select.json").read_text())
    return document, {candidate["name"]: candidate for candidate in document["candidates"]}


def test_a_run(trained, capsys):
    """Every candidate's accuracy is that of its model on the validation split, and what it says to run, runs."""
    assert select(trained) == 0
    out = capsys.readouterr().out
    assert f"4 candidates on 12 samples of fake/val of {trained}/config.yaml\n" in out
    assert {path.name for path in (trained / "select").iterdir()} == {"select.json", "select.html"}
    document, found = answer(trained / "select")
    kinds = {name: candidate["kind"] for name, candidate in found.items()}
    assert kinds == {
        "test_resnet": "teacher", "mamba_pkd_s1": "student", "mamba_pkd_s2": "student",
        "ensemble_2": "ensemble",
    }  # fmt: skip
    assert document["samples"] == 12 and document["made_by"]["hardware"]["device"] == "cpu"

    job = prepare(trained / "config.yaml", torch.device("cpu"))
    load_weights(job.student, trained / "weights" / "ensemble.safetensors")
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
    file = FORMATS["pt2"].open(trained / "export" / "ensemble_2.pt2")
    torch.testing.assert_close(file(x), ensemble(x), rtol=1e-4, atol=1e-5)
    assert main([*words["mamba_pkd_s2"][1:-1], "hf"]) == 0  # as above, but pt2 takes seconds
    loaded = timm.create_model("local-dir:runs/mamba_pkd_s2/export/mamba_pkd_s2", pretrained=True).eval()
    assert torch.equal(loaded(x), models["mamba_pkd_s2"](x))
    Path("teacher.yaml").write_text(found["test_resnet"]["how"])
    again = build_model(load_yaml_file("teacher.yaml")["models"]["model"]).eval()
    assert torch.equal(again(x), models["test_resnet"](x))


def test_named_models_beside_a_run(trained, capsys):
    """By checkpoint and from a folder, on the run's samples; what the first command says, runs."""
    model = weights(Path("three.safetensors"), "mamba_pkd_s1", img_size=8)
    words = ["--num-classes", "3", "--in-chans", "1", "--img-size", "8"]
    named = ["export", "mamba_pkd_s1", "--checkpoint", "three.safetensors", *words]
    assert main([*named, "--format", "hf", "--output", "hub"]) == 0
    capsys.readouterr()
    assert select(trained, "--models", "mamba_pkd_s1=three.safetensors", "local-dir:hub/mamba_pkd_s1") == 0
    _, found = answer(trained / "select")
    one, other = found["mamba_pkd_s1 #2"], found["local-dir:hub/mamba_pkd_s1"]
    assert one["kind"] == "model" and one["accuracy"] == other["accuracy"]
    assert {one["status"], other["status"]} & {"redundant", "dominated"}
    assert other["how"] == "mamba-pkd export local-dir:hub/mamba_pkd_s1 --img-size 8 --format pt2"
    assert main([*shlex.split(one["how"])[1:-1], "hf"]) == 0
    x = torch.randn(3, 1, 8, 8)
    loaded = timm.create_model("local-dir:runs/mamba_pkd_s1/export/mamba_pkd_s1", pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))


def test_a_model_for_other_images_is_told(trained, build, progressive, write, caplog):
    """A folder brings its mean and std along; those of the run's transforms are others."""
    weights(Path("three.safetensors"), "mamba_pkd_s1", img_size=8)
    words = ["--checkpoint", "three.safetensors", "--num-classes", "3", "--in-chans", "1", "--img-size", "8"]
    assert main(["export", "mamba_pkd_s1", *words, "--format", "hf", "--output", "hub"]) == 0
    normalize = build.call("torchvision.transforms.Normalize", mean=[0.25], std=[0.125])
    steps = [build.call("torchvision.transforms.ToTensor"), normalize]
    both = build.call("torchvision.transforms.Compose", transforms=steps)
    for split in progressive["datasets"].values():
        split["init"]["kwargs"]["transform"] = both
    shutil.copy(write(progressive), trained / "config.yaml")
    assert select(trained, "--models", "local-dir:hub/mamba_pkd_s1") == 0
    own = "local-dir:hub/mamba_pkd_s1 is made for images of mean "
    assert own in caplog.text and "those of fake/val of run/config.yaml are of [0.25]" in caplog.text


def test_named_models_on_images(images, tmp_path, monkeypatch):
    """As evaluate --model sees them; 12 images, some of them large."""
    monkeypatch.chdir(tmp_path)
    folder = images("a", "b", "c", size=40)
    weights(Path("one.safetensors"), "mamba_pkd_s1")
    weights(Path("two.safetensors"), "test_resnet")
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


def test_a_run_on_images(trained, images):
    """The run's own transforms, and its models beside named ones."""
    folder = images("a", "b", "c")
    weights(Path("three.safetensors"), "mamba_pkd_s1", img_size=8)
    pool = [trained, "--models", "mamba_pkd_s1=three.safetensors", "--data-root", folder, "-j", "0"]
    assert select(*pool, "--output", "out") == 0
    document, found = answer(Path("out"))
    assert document["samples"] == 12 and document["samples_of"] == f"{folder} (validation)" and len(found) == 5


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


def test_nothing_fits(trained, capsys):
    assert select(trained, "--max-macs", "0.001", "--min-accuracy", "0", "--safe-config") == 0
    out = capsys.readouterr().out
    assert "Nothing keeps the constraints. The nearest miss:" in out
    assert re.search(r"mamba_pkd_s1.*  \d+ % above --max-macs 0.001\n", out)
    document, _ = answer(trained / "select")
    assert document["front"] == [] and document["nearest_miss"]["name"] == "mamba_pkd_s1"


def looked_up(ensemble: Any, x: torch.Tensor, leaves: Callable[[torch.Tensor, int], torch.Tensor]) -> tuple[Any, Any]:
    """Classes and mean MACs of a cascade that computes everything first; ``leaves`` says who leaves after k."""
    with torch.no_grad():
        logits = torch.stack([ensemble.first(k)(x) for k in range(1, 1 + len(ensemble.students))])
    macs = [count_macs(ensemble.first(k), (1, 8, 8)) for k in range(1, 1 + len(ensemble.students))]
    used = torch.full((len(x),), len(macs))
    for k in range(len(macs) - 1, 0, -1):
        used[leaves(logits, k)] = k
    classes = logits.argmax(-1)[used - 1, torch.arange(len(x))]
    return classes, sum(macs[k - 1] for k in used.tolist()) / len(x)


def test_a_fitted_cascade(trained, capsys):
    """By the policy that the run's weights bring along; the command that runs it, runs."""
    job = prepare(trained / "config.yaml", torch.device("cpu"))
    ensemble: Any = job.student.eval()
    load_weights(ensemble, trained / "weights" / "ensemble.safetensors")
    data = [job.datasets["fake/val"][i] for i in range(12)]
    x, labels = torch.stack([image for image, _ in data]), torch.tensor([label for _, label in data])
    with torch.no_grad():
        first = ensemble.first(1)(x).softmax(-1).amax(-1)
    threshold = float(first.median())
    ensemble.policy = Confidence([threshold])
    save_weights(ensemble, trained / "weights" / "ensemble.safetensors")
    classes, macs = looked_up(ensemble, x, lambda logits, k: first > threshold)
    assert select(trained) == 0
    capsys.readouterr()
    _, found = answer(trained / "select")
    cascade = found["cascade_confidence"]
    assert cascade["kind"] == "cascade" and cascade["params"] == found["ensemble_2"]["params"]
    assert cascade["accuracy"] == pytest.approx(100 * (classes == labels).double().mean().item())
    assert cascade["macs"] == pytest.approx(macs / 1e6) and cascade["latency"] > 0
    assert found["mamba_pkd_s1"]["macs"] < cascade["macs"] < found["ensemble_2"]["macs"]
    python, flag, code = shlex.split(cascade["how"])
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    assert capsys.readouterr().out.startswith("Prediction(logits=")


def test_a_cascade_by_agreement():
    torch.manual_seed(0)
    students = ["mamba_pkd_s1"] * 4
    ensemble: Any = timm.create_model("mamba_pkd_ensemble", students=students, img_size=8, **SIZES).eval()
    for student in ensemble.students:
        nn.init.normal_(student.head.fc.weight)
    x, labels = torch.rand(50, 1, 8, 8), torch.randint(3, (50,))
    data = Readable(TensorDataset(x, labels), "random", training=False)
    samples = pool.Samples(data, "random", (1, 8, 8), batch_size=20, workers=0)
    (member,) = pool._cascades(RunFolder("run"), ensemble, samples)
    exits = {member.name: selecting._Exits()}
    (predicted,), _ = selecting._predict([member], torch.device("cpu"), exits)

    def leaves(logits: torch.Tensor, k: int) -> torch.Tensor:
        both = logits.argmax(-1)
        return (both[k - 1] == both[k - 2]) & (torch.tensor(k) > 1)

    classes, macs = looked_up(ensemble, x, leaves)
    assert torch.equal(predicted, classes)
    assert exits[member.name].mean_macs(ensemble.step_macs((1, 8, 8))) == pytest.approx(macs)
    assert sum(exits[member.name].counts.values()) == 50 and len(exits[member.name].counts) > 1


def test_students_that_are_not_active(trained, caplog):
    job = prepare(trained / "config.yaml", torch.device("cpu"))
    ensemble: Any = job.student.eval()
    load_weights(ensemble, trained / "weights" / "ensemble.safetensors")
    ensemble.policy = Confidence([0.5])
    ensemble.set_active([1])
    save_weights(ensemble, trained / "weights" / "ensemble.safetensors")
    assert select(trained) == 0
    assert set(answer(trained / "select")[1]) == {"test_resnet", "mamba_pkd_s2"}
    assert "The policy of run is left out: the thresholds are for the first 2 students" in caplog.text


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

number = 3
"""


def test_propose(trained, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    Path("my_proposals.py").write_text(PROPOSE)
    assert select(trained, "--propose", "my_proposals:both", "--output", "out") == 0
    _, found = answer(Path("out"))
    assert found["both"]["kind"] == "proposed" and found["both"]["how"]
    parts = [found["mamba_pkd_s1"], found["test_resnet"]]
    assert found["both"]["macs"] == pytest.approx(sum(part["macs"] for part in parts))
    assert select(trained, "--propose", "my_proposals:nothing", "--output", "again") == 0
    capsys.readouterr()
    for name, message in {
        "my_proposals:wrong": "must return a dictionary of new names and torch modules",
        "my_proposals:fails": "--propose my_proposals:fails: 'x' is missing or unknown",
        "my_proposals:number": "is no function",
        "my_proposals:absent": "must be MODULE:FUNCTION of a module that can be imported",
        "no_such_module:f": "must be MODULE:FUNCTION of a module that can be imported",
    }.items():
        assert select(trained, "--propose", name, "--output", "new") == 2
        assert message in error(capsys)
    assert select(trained, "--propose", "my_proposals:both", "--safe-config") == 2
    assert "--safe-config refuses" in error(capsys)


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr: one line."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("mamba-pkd: error: ")
    return line


@pytest.fixture
def no_compute(monkeypatch):
    def fail(*args: Any) -> None:
        raise AssertionError("something is measured")

    for name in ("_predict", "measure_latency", "count_macs", "measure_peak_memory"):
        monkeypatch.setattr(f"timm_mamba_pkd.runner.select.{name}", fail)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the pool is empty: name folders of runs, or timm models by --models"),
        (["run", "--min-accuracy", "101"], "--min-accuracy 101 contradicts itself"),
        (["run", "--max-macs", "-1"], "--max-macs -1 contradicts itself"),
        (["run", "--max-latency", "nan"], "--max-latency nan contradicts itself"),
        (["run", "--min-disagreement", "-1"], "--min-disagreement -1 is not from 0 to 100"),
        (["images"], "images is not the folder of a run (no config.yaml in it)"),
        (["nowhere"], "nowhere is not the folder of a run"),
        (["run", "--models", "mamba_pkd_s9=x.safetensors"], "unknown model 'mamba_pkd_s9'"),
        (["run", "--models", "mamba_pkd_s1"], "--models mamba_pkd_s1 has no weights: write mamba_pkd_s1=CHECKPOINT"),
        (["run", "--models", "mamba_pkd_s1=nowhere.pt"], "weights file nowhere.pt does not exist"),
        (["run", "--models", "local-dir:nowhere"], "model local-dir:nowhere cannot be created"),
        (["run", "--models", "mamba_pkd_s1=rgb.safetensors"], "mamba_pkd_s1 cannot take images of 1x8x8"),
        (["run", "--img-size", "8"], "--img-size is that of the run in run: leave it out"),
        (["--models", "mamba_pkd_s1=two.safetensors"], "there are no labelled samples: name a folder"),
        (["--models", "mamba_pkd_s1=two.safetensors", "--data-root", "images"], "images has 3 classes, mamba_pkd_s1 2"),
        (["--models", "mamba_pkd_s1=two.safetensors", "--data-root", "images/a"], "images/a has no labels"),
        (["--models", "mamba_pkd_s1=two.safetensors", "--data-root", "empty"], "--data-root empty"),
        (["--models", "mamba_pkd_s1=two.safetensors", "--data-root", "nowhere"], "--data-root nowhere is not there"),
        (["run", "--data-root", "images/a"], "images/a has no labels: it must hold a folder of images per class"),
        (["run", "--output", "taken"], "taken/select.html exists already: choose another --output"),
    ],
)
def test_bad_input(words, message, trained, images, no_compute, capsys):
    images("a", "b", "c")
    Path("empty").mkdir()
    Path("taken").mkdir()
    Path("taken/select.html").touch()
    weights(Path("two.safetensors"), "mamba_pkd_s1", num_classes=2)
    weights(Path("rgb.safetensors"), "mamba_pkd_s1", in_chans=3)
    before = sorted(Path().rglob("*"))
    assert select(*words) == 2
    assert message in error(capsys)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("test", "'fake/test', is the test set, on which nothing may be fitted or chosen: name labelled images by"),
        ("overlap", "'fake/val', shares 4 of its 12 samples with the test set, 'fake/test', on which nothing may be"),
        ("nameless", "names no validation split: name labelled images by --data-root"),
        ("empty", "is empty: name labelled images by --data-root"),
        ("unlabelled", "are no labelled images"),
        ("failing", "sample 0 of data set 'fake/val' cannot be read (TypeError"),
        ("gone", "cannot be read"),
    ],
)
def test_a_validation_split_that_cannot_serve(change, message, progressive, trained, build, write, capsys, no_compute):
    if change == "test":
        progressive["train"]["init"]["kwargs"]["val_data_loader"] = build.loader("fake/test")
    elif change == "overlap":
        for name, first in (("val", 0), ("test", 8)):
            part = build.call("torch.utils.data.Subset", dataset=build.fake_images(30, offset=0))
            part["init"]["kwargs"]["indices"] = list(range(first, first + 12))
            progressive["datasets"][f"fake/{name}"] = part
    elif change == "nameless":
        progressive["train"]["init"]["kwargs"]["val_data_loader"] = build.loader("fake/other")
    elif change == "empty":
        progressive["datasets"]["fake/val"] = build.fake_images(0, offset=100)
    elif change in ("unlabelled", "failing"):
        key, argument = ("operator.attrgetter", "__doc__") if change == "unlabelled" else ("operator.itemgetter", 0)
        transform = build.call(key)
        transform["init"] = {"args": [argument]}
        progressive["datasets"]["fake/val"]["init"]["kwargs"]["target_transform"] = transform
    else:
        progressive["datasets"]["fake/val"]["init"]["kwargs"]["size"] = "many"
        progressive["datasets"]["fake/test"] = build.call("torchvision.datasets.MNIST", root="nowhere")
    shutil.copy(write(progressive), trained / "config.yaml")
    assert select(trained) == 2
    assert message in error(capsys)


def test_labels_that_a_model_lacks(trained, capsys):
    """Of data that do not say how many classes they have."""
    weights(Path("two.safetensors"), "mamba_pkd_s1", num_classes=2)
    assert select(trained, "--models", "mamba_pkd_s1=two.safetensors") == 2
    assert "fake/val of run/config.yaml has a label 2, mamba_pkd_s1 #2 has 2 classes" in error(capsys)


def test_a_teacher_that_is_gone_is_left_out(trained, capsys, caplog):
    Path("teacher.safetensors").unlink()
    assert select(trained) == 0
    assert "The teacher of run/config.yaml is left out: weights file teacher.safetensors does not exist" in caplog.text
    assert "test_resnet" not in answer(trained / "select")[1]


def test_images_that_cannot_be_read(trained, images, capsys):
    folder = images("a", "b", "c")
    (folder / "a" / "1.png").write_bytes(b"no image")
    assert select(trained, "--data-root", folder, "-j", "0") == 2
    assert "1 of 12 images cannot be read, so there is no result" in error(capsys)
    assert not (trained / "select").exists()
