"""``mamba-pkd calibrate``: on what it fits, what it saves and says, and its errors."""

import json
import logging
import os
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from timm_mamba_pkd import distributed
from timm_mamba_pkd.models import MambaPKDEnsemble, count_macs, save_weights
from timm_mamba_pkd.models.calibration import Point
from timm_mamba_pkd.runner.calibrate import _choose
from timm_mamba_pkd.runner.config import prepare

KWARGS: dict[str, Any] = {
    "students": ["mamba_pkd_s1", "mamba_pkd_s2"], "num_classes": 3, "in_chans": 1, "img_size": 8,
}  # fmt: skip
WEIGHTS = Path("run/weights/ensemble.safetensors")
FILES = {"calibration.json", "calibration.md"}


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch):
    """Timing as well as plots take most of the time; both have tests of their own."""
    monkeypatch.setattr("timm_mamba_pkd.runner.calibrate._in_turns", lambda models, *args: [0.001] * len(models))
    monkeypatch.setattr("timm_mamba_pkd.runner.calibrate.plot_calibration", lambda *args: None)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Where the run of `trained` is kept from test to test."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def config(progressive, build) -> dict[str, Any]:
    """As many images as it takes to tell thresholds apart."""
    progressive["datasets"]["fake/val"] = build.fake_images(60, offset=100)
    progressive["datasets"]["fake/test"] = build.fake_images(45, offset=200)
    return progressive


@pytest.fixture
def trained(config, run, write, kept, tmp_path, capsys, monkeypatch) -> dict[str, Any]:
    """The config of the finished run in the folder run, whose students know some of the noise by heart."""
    monkeypatch.chdir(tmp_path)
    if not (kept / "run").exists():
        assert run(config)[0] == 0
        ensemble: Any = timm.create_model("mamba_pkd_ensemble", checkpoint_path=str(WEIGHTS), **KWARGS)
        x, labels = images(write, config, "fake/val")
        learn(ensemble, x, labels, 3e-2, 3e-3)
        save_weights(ensemble, WEIGHTS)
        shutil.copytree("run", kept / "run")
        shutil.rmtree("run")
        capsys.readouterr()
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    return config


@torch.no_grad()
def learn(ensemble: Any, x: Tensor, labels: Tensor, *penalties: float) -> None:
    """Fit the students' classifiers by least squares."""
    targets = 4 * nn.functional.one_hot(labels, 3).float() - 4 / 3
    for student, penalty in zip(ensemble.eval().students, penalties, strict=True):
        features = student.forward_head(student.forward_features(x), pre_logits=True)
        mean = features.mean(0)
        centred = features - mean
        ridge = penalty * centred.square().sum() / len(mean) * torch.eye(len(mean))
        student.head.fc.weight.copy_(torch.linalg.solve(centred.T @ centred + ridge, centred.T @ targets).T)
        student.head.fc.bias.copy_(-student.head.fc.weight @ mean)


@pytest.fixture
def calibrate(run, write) -> Callable[..., int]:
    def calibrate(config: Any, *flags: str, output: str = "run") -> int:
        """Of a run that might as well have been trained by ``config``."""
        if Path(output).exists():
            shutil.copy(write(config), Path(output, "config.yaml"))
        return run(config, *flags, command="calibrate", output=output)[0]

    return calibrate


def document() -> dict[str, Any]:
    return json.loads(Path("run/calibration/calibration.json").read_text())


def loaded() -> MambaPKDEnsemble:
    ensemble: Any = timm.create_model("mamba_pkd_ensemble", checkpoint_path=str(WEIGHTS), **KWARGS)
    return ensemble.eval()


def images(write: Callable[..., Path], config: Any, dataset_id: str) -> tuple[Tensor, Tensor]:
    dataset = prepare(write(config), torch.device("cpu")).datasets[dataset_id]
    data = [dataset[i] for i in range(len(dataset))]
    return torch.stack([image for image, _ in data]), torch.tensor([label for _, label in data])


def look_up(ensemble: Any, x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Tempered confidences and logits of the ensemble after each student, by definition, and MACs after each."""
    with torch.no_grad():
        logits = torch.stack([ensemble.first(k)(x) for k in (1, 2)])
    temperatures = torch.tensor(ensemble.policy.temperatures)[:, None, None]
    return (
        (logits / temperatures).softmax(-1).amax(-1),
        logits,
        [count_macs(ensemble.first(k), (1, 8, 8)) for k in (1, 2)],
    )


def test_what_it_writes(trained, calibrate, write, capsys):
    """The policy comes with the weights, which stay bit for bit; the report's numbers are those of the test set."""
    before = load_file(WEIGHTS)
    rest = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path != WEIGHTS}
    assert calibrate(trained) == 0
    out = capsys.readouterr().out
    assert {path.name for path in Path("run/calibration").iterdir()} == FILES
    assert {path: path.read_bytes() for path in rest} == rest
    after = load_file(WEIGHTS)
    assert after.keys() - before.keys() == {"policy.thresholds", "policy.temperatures", "policy.measure"}
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name

    ensemble, found = loaded(), document()
    policy = ensemble.policy
    assert policy is not None and policy.measure == found["measure"] == "max_prob"
    assert found["policy"] == {"thresholds": list(policy.thresholds), "temperatures": list(policy.temperatures)}
    assert found["split"] == {"dataset_id": "fake/val", "samples": 60}
    assert (
        "fitted on 60 samples of fake/val" in out
        and "fitted on 60 samples of fake/val" in Path("run/calibration/calibration.md").read_text()
    )
    assert f"The policy is saved in {WEIGHTS.resolve()}" in out
    assert found["made_by"]["hardware"]["device"] == "cpu"

    x, labels = images(write, trained, "fake/test")
    results = {row["model"]: row for row in found["results"]}
    first, _, *others = results
    assert [first, *others] == ["early exit", "all students", "teacher"]
    students = right = spent = 0
    totals = torch.tensor(ensemble.step_macs(x.shape[1:])).cumsum(0)
    for batch, targets in zip(x.split(8), labels.split(8), strict=True):  # of the config's batch size
        prediction = ensemble.predict(batch)
        students += int(prediction.students.sum())
        right += int((prediction.logits.argmax(-1) == targets).sum())
        alone = totals[prediction.students - 1].sum().item()  # without what pads batches
        assert alone <= prediction.macs <= 2 * alone
        spent += alone
    row = results["early exit"]
    assert [row["students"], row["top1"], row["macs"]] == pytest.approx([students / 45, 100 * right / 45, spent / 45])
    with torch.no_grad():
        accuracy = 100 * (ensemble(x).argmax(-1) == labels).double().mean().item()
    sure, logits, macs = look_up(ensemble, x)
    assert results["all students"]["top1"] == pytest.approx(accuracy)
    assert results["all students"]["macs"] == macs[1] and results["all students"]["students"] == 2
    teacher: Any = prepare(write(trained), torch.device("cpu")).teacher
    assert results["teacher"]["macs"] == count_macs(teacher, (1, 8, 8))

    left = [int((sure[0] > policy.thresholds[0]).sum())]
    assert [row["exits_test"] for row in found["students"]] == [left[0], 45 - left[0]]
    for k, row in enumerate(found["students"]):
        assert row["top1"] == pytest.approx(100 * (logits[k].argmax(-1) == labels).double().mean().item())
        assert sum(part["count"] for part in found["reliability"][k]) == 45
        assert row["temperature"] == policy.temperatures[k]
    assert sum(row["exits_val"] for row in found["students"]) == 60
    for row in found["curve"]:
        used = torch.where(sure[0] > row["threshold"], 0, 1)
        assert row["students"] == pytest.approx(used.double().mean().item() + 1)
        assert row["macs"] == pytest.approx(torch.tensor(macs)[used].double().mean().item())
        top1 = 100 * (logits[used, torch.arange(45)].argmax(-1) == labels).double().mean().item()
        assert row["top1"] == pytest.approx(top1)


def test_the_single_student_is_the_best_on_the_validation_split_that_costs_no_more(trained, calibrate, write):
    assert calibrate(trained, "--max-macs", "1000") == 0  # any student costs less
    ensemble, found = loaded(), document()
    x, labels = images(write, trained, "fake/val")
    tested, wanted = images(write, trained, "fake/test")
    with torch.no_grad():
        right = [int((student(x).argmax(-1) == labels).sum()) for student in ensemble.students]
        best = max((0, 1), key=right.__getitem__)
        top1 = 100 * (ensemble.students[best](tested).argmax(-1) == wanted).double().mean().item()
    row = found["results"][1]
    assert row["model"] == f"{ensemble.names[best]} alone" and row["top1"] == pytest.approx(top1)
    assert row["macs"] == count_macs(ensemble.students[best], (1, 8, 8))
    assert "ms_at_batch_45" in row and "ms_at_batch_1" in row  # there are no 256 images
    assert calibrate(trained, "--safe-config", "--min-accuracy", "0", "-student_only") == 0  # all leave after the first
    names = [row["model"] for row in document()["results"]]
    assert names == ["early exit", "mamba_pkd_s1 alone", "all students"]


def test_a_run_that_is_measured_again_says_that_it_loses_its_early_exit(trained, calibrate, run, caplog):
    assert calibrate(trained) == 0 and loaded().policy is not None
    Path("run/results.csv").unlink()
    caplog.clear()
    assert run(trained)[0] == 0
    assert "without early exit: fit it anew with mamba-pkd calibrate" in caplog.text and loaded().policy is None


@pytest.mark.parametrize("flags", [[], ["--min-accuracy", "20"], ["--max-macs", "0.12"], ["--measure", "margin"]])
def test_the_test_set_has_no_say(flags, trained, calibrate, build):
    """Other test images and labels, the same policy; another validation split, another policy."""
    policies = []
    for val, test in ((100, 200), (100, 900), (500, 200)):
        trained["datasets"]["fake/val"] = build.fake_images(60, offset=val)
        trained["datasets"]["fake/test"] = build.fake_images(30, offset=test)
        assert calibrate(trained, *flags) == 0
        policies.append(repr(loaded().policy))
    assert policies[0] == policies[1] != policies[2]


class Truth:
    """Accuracy in percent and average MACs on the validation split of early exit, looked up image by image."""

    def __init__(self, ensemble: MambaPKDEnsemble, x: Tensor, labels: Tensor) -> None:
        assert ensemble.policy is not None
        self.own = ensemble.policy.thresholds[0]
        sure, logits, self.macs = look_up(ensemble, x)
        self.sure, self.said, self.labels = sure[0].tolist(), logits.argmax(-1).tolist(), labels.tolist()

    def of(self, threshold: float) -> tuple[float, float]:
        used = [0 if value > threshold else 1 for value in self.sure]
        right = [self.said[k][i] == self.labels[i] for i, k in enumerate(used)]
        return 100 * sum(right) / len(used), sum(self.macs[k] for k in used) / len(used)

    def of_all(self) -> list[tuple[float, float]]:
        return [self.of(threshold) for threshold in (0.0, 1.0, *(value + 1e-6 for value in self.sure))]


def test_max_macs(trained, calibrate, write):
    """The longest that is not above it; the ends are the first student alone, and all students."""
    x, labels = images(write, trained, "fake/val")
    first, both = (count_macs(loaded().first(k), (1, 8, 8)) for k in (1, 2))
    for limit in (first, (2 * first + both) / 3, both - 1, both, 2 * both):
        assert calibrate(trained, "--max-macs", repr(limit / 1e6)) == 0
        truth = Truth(loaded(), x, labels)
        _, spent = truth.of(truth.own)
        assert spent == pytest.approx(max(macs for _, macs in truth.of_all() if macs <= limit + 1e-6))
        assert document()["wanted"].startswith(f"at most {limit / 1e6:g} million")


def test_min_accuracy(trained, calibrate, write, errors):
    """The cheapest that reaches it; out of reach it names the best, and saves nothing."""
    x, labels = images(write, trained, "fake/val")
    assert calibrate(trained) == 0
    table = Truth(loaded(), x, labels).of_all()
    accuracies = sorted(accuracy for accuracy, _ in table)
    assert 40 < accuracies[0] < accuracies[len(accuracies) // 2] < accuracies[-1] < 99
    for limit in (0, accuracies[len(accuracies) // 2] - 1e-6, accuracies[-1] - 1e-6):
        assert calibrate(trained, "--min-accuracy", repr(limit)) == 0
        truth = Truth(loaded(), x, labels)
        accuracy, spent = truth.of(truth.own)
        assert accuracy >= limit
        assert spent == pytest.approx(min(macs for accuracy, macs in table if accuracy >= limit))
    saved = WEIGHTS.read_bytes()
    errors()
    assert calibrate(trained, "--min-accuracy", "99.5") == 2
    (error,) = errors()
    best = f"{accuracies[-1]:.2f}"
    assert error == f"--min-accuracy 99.5 is not reached on the validation split: the best is {best}"
    assert WEIGHTS.read_bytes() == saved


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
def test_without_a_wish_nothing_changes(measure, trained, calibrate, write):
    """On the validation split every image is predicted as by all students, and some leave early.

    Here the first student has its way, and is sure.
    """
    ensemble: Any = loaded()
    x, labels = images(write, trained, "fake/val")
    learn(ensemble, x, labels, 1e-3, 3e-3)
    with torch.no_grad():
        for parameter in ensemble.students[0].head.fc.parameters():
            parameter *= 10
    save_weights(ensemble, WEIGHTS)
    assert calibrate(trained, "--measure", measure) == 0
    ensemble = loaded()
    prediction = ensemble.predict(x)
    with torch.no_grad():
        assert torch.equal(prediction.logits.argmax(-1), ensemble(x).argmax(-1))
    assert document()["wanted"] == "no worse than all students"
    assert document()["measure"] == ensemble.policy.measure == measure
    assert [row["exits_val"] for row in document()["students"]] == prediction.students.bincount()[1:].tolist()
    assert prediction.students.unique().tolist() == [1, 2]


def test_a_surer_early_exit_may_agree_less():
    """An image that left right may go on to a student that errs: then the next is taken."""
    table = [(0.0, 0.5, 1), (0.5, 1.0, 2), (0.95, 0.9, 3), (0.97, 1.0, 4), (1.0, 1.0, 5)]
    points = [Point(threshold, 0.5, agreement, macs) for threshold, agreement, macs in table]
    assert _choose(Namespace(max_macs=None, min_accuracy=None), points).macs == 4
    assert _choose(Namespace(max_macs=None, min_accuracy=None), points[-1:]).macs == 5


def test_once_more(trained, calibrate, caplog):
    """The policy is replaced; the log says which one was there, and the report of it is kept."""
    assert calibrate(trained) == 0
    first, policy, report = load_file(WEIGHTS), loaded().policy, document()
    Path("run/calibration/calibration.png").write_bytes(b"a plot")
    Path("run/calibration/notes.txt").write_text("mine")
    with caplog.at_level(logging.INFO):
        assert calibrate(trained, "--min-accuracy", "0", "--measure", "entropy") == 0
    assert f"The policy takes the place of {policy}" in caplog.text
    assert f"Moved the report before to {Path('run/calibration/old-1').resolve()}" in caplog.text
    assert json.loads(Path("run/calibration/old-1/calibration.json").read_text()) == report
    assert Path("run/calibration/old-1/calibration.png").read_bytes() == b"a plot"
    second = load_file(WEIGHTS)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) is not name.startswith(("policy.thresholds", "policy.measure")), name
    assert document()["policy"]["thresholds"] == [0] and document() != report
    assert calibrate(trained) == 0  # what was there has no say
    assert {name: tensor.tolist() for name, tensor in load_file(WEIGHTS).items()} == {
        name: tensor.tolist() for name, tensor in first.items()
    }
    found = {str(path.relative_to("run/calibration")) for path in Path("run/calibration").rglob("*") if path.is_file()}
    kept = {f"{old}/{name}" for old in ("old-1", "old-2") for name in FILES}
    assert found == FILES | kept | {"old-1/calibration.png", "notes.txt"}


def test_a_calibration_that_ends_early(trained, calibrate, monkeypatch):
    """Policy and report are those of before; a signal while they are saved waits for both."""
    assert calibrate(trained) == 0
    before = contents()
    with monkeypatch.context() as patch:
        patch.setattr("timm_mamba_pkd.runner.calibrate._in_turns", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        assert calibrate(trained, "--min-accuracy", "0") == 143
    assert contents() == before
    with monkeypatch.context() as patch:
        patch.setattr("timm_mamba_pkd.runner.calibrate.save_weights", saved_while_interrupted)
        assert calibrate(trained, "--min-accuracy", "0") == 143
    policy = loaded().policy
    assert policy is not None and document()["policy"]["thresholds"] == list(policy.thresholds) == [0]
    found = {str(path.relative_to("run/calibration")) for path in Path("run/calibration").rglob("*") if path.is_file()}
    assert found == FILES | {f"old-1/{name}" for name in FILES}


def saved_while_interrupted(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    save_weights(*args)


@pytest.mark.parametrize("progressively", [True, False])
def test_training_on_drops_the_policy(progressively, trained, calibrate, run, build, caplog):
    """A run that starts from calibrated weights leaves no policy, which would be of other weights than its own."""
    assert calibrate(trained) == 0
    models = trained["models"]
    if not progressively:
        trained["train"] = build.stage(log_freq=1000, model={"forward_proc": "forward_batch_only"})
        trained["models"] = {"model": models["student_model"]}
    (student,) = [model for role, model in trained["models"].items() if role != "teacher_model"]
    student["src_ckpt"] = str(WEIGHTS)
    caplog.clear()
    assert run(trained, output="further")[0] == 0
    assert caplog.text.count("The policy of early exit is dropped: the weights it was fitted for are ") == 1
    found = load_file("further/weights/ensemble.safetensors")
    assert found and not any(name.startswith("policy.") for name in found)


@pytest.fixture
def no_compute(monkeypatch):
    def fail(*args: Any) -> None:
        raise AssertionError("something is computed")

    monkeypatch.setattr("timm_mamba_pkd.runner.calibrate._outcome", fail)


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-accuracy", "101"], "--min-accuracy 101 is not from 0 to 100"),
        (["--min-accuracy", "-1"], "--min-accuracy -1 is not from 0 to 100"),
        (["--min-accuracy", "nan"], "--min-accuracy nan is not from 0 to 100"),
        (["--max-macs", "0.001"], "--max-macs 0.001 is below what the first student takes, "),
        (["--max-macs", "-1"], "--max-macs -1 is not a number above 0"),
        (["--max-macs", "nan"], "--max-macs nan is not a number above 0"),
        (["--max-macs", "inf"], "--max-macs inf is not a number above 0"),
    ],
)
def test_wishes_that_cannot_be(flags, message, trained, calibrate, write, errors, no_compute):
    write(trained)
    before = contents()
    assert calibrate(trained, *flags) == 2
    (error,) = errors()
    assert error.startswith(message)
    assert contents() == before


def test_both_wishes(trained, calibrate, capsys):
    with pytest.raises(SystemExit, match="2"):
        calibrate(trained, "--min-accuracy", "30", "--max-macs", "1")
    assert "argument --max-macs: not allowed with argument --min-accuracy" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["same", "renamed", "overlapping"])
def test_never_on_the_test_set(change, trained, calibrate, build, errors, no_compute):
    if change == "overlapping":
        for name, first in (("val", 0), ("test", 40)):
            part = build.call("torch.utils.data.Subset", dataset=build.fake_images(100, offset=0))
            part["init"]["kwargs"]["indices"] = list(range(first, first + 50))
            trained["datasets"][f"fake/{name}"] = part
    else:
        trained["train"]["init"]["kwargs"]["val_data_loader"] = build.loader("fake/test")
    if change == "renamed":
        trained["datasets"]["fake/held_out"] = build.fake_images(45, offset=200)
        trained["test"]["test_data_loader"] = build.loader("fake/held_out")
    before = contents()
    assert calibrate(trained) == 2
    (error,) = errors()
    assert "on which nothing may be fitted or chosen: train with a validation split of its own" in error
    assert ("shares 10 of its 50 samples with the test set, 'fake/test'" in error) is (change == "overlapping")
    del before[Path("run/config.yaml")]
    assert contents().items() >= before.items()


def test_only_with_the_config_of_the_run(trained, calibrate, run, build, errors, no_compute, monkeypatch):
    """Other students, splits and seeds, which draw splits, are refused before anything is built."""
    shutil.copy("run/config.yaml", "its_own.yaml")
    monkeypatch.setattr("timm_mamba_pkd.runner.calibrate.set_up", lambda *args: 1 / 0)
    before = contents()
    advice = "calibrate a run with its own config and --seed"
    folder = Path("run").resolve()

    def said(config: Any, *flags: str) -> str:
        assert run(config, *flags, command="calibrate")[0] == 2
        (error,) = errors()
        return error

    assert said(trained, "--seed", "1") == f"the run in {folder} began with --seed 42, not with --seed 1: {advice}"
    trained["datasets"]["fake/val"] = build.fake_images(60, offset=500)
    error = said(trained)
    assert "config.yaml differs in line " in error
    assert error.endswith(f" from {folder}/config.yaml, as the run began: {advice}")
    Path("config.yaml").unlink(missing_ok=True)
    assert contents() == before
    for name in ("run.json", "config.yaml"):
        Path("run", name).unlink()
        missing = f"{folder}/{name}, as the run began, is missing: put it back, or train anew with --fresh"
        assert said(Path("its_own.yaml")) == missing


def test_runs_that_cannot_be_calibrated(trained, plain, run, calibrate, errors, no_compute, monkeypatch):
    def said(config: Any, output: str) -> str:
        errors()
        assert calibrate(config, output=output) == 2
        (error,) = errors()
        return error

    assert said(trained, "nowhere").endswith("nowhere holds no finished run: train it first with mamba-pkd train")
    assert not Path("nowhere").exists()
    shutil.copytree("run", "unfinished")
    Path("unfinished/results.csv").unlink()
    assert said(trained, "unfinished").endswith("unfinished holds no finished run: train it first with mamba-pkd train")
    assert said(plain, "run").endswith("config.yaml trains no ensemble: early exit needs several students")

    ensemble = loaded()
    ensemble.set_active([1])
    save_weights(ensemble, WEIGHTS)
    assert said(trained, "run").endswith("ensemble.safetensors, 2 are active: early exit needs all")
    WEIGHTS.write_bytes(WEIGHTS.read_bytes()[:1000])
    assert str(WEIGHTS) in said(trained, "run")
    WEIGHTS.unlink()
    assert f"{WEIGHTS} does not exist" in said(trained, "run")

    trained["models"]["student_model"]["kwargs"]["students"] = ["mamba_pkd_s1"]
    trained["train"]["init"]["kwargs"]["students"] = ["mamba_pkd_s1"]
    assert said(trained, "run").endswith("config.yaml trains a single student: early exit needs several")

    for name in distributed.VARIABLES:
        monkeypatch.setenv(name, "2")
    assert said(trained, "run") == "calibrate works in one process: start it without torchrun"
