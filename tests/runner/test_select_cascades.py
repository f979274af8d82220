"""``mamba-pkd select``: ensembles with early exit among the candidates."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import TensorDataset

from timm_mamba_pkd.cli import main
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
    monkeypatch.setattr("timm_mamba_pkd.report.selection_report.plot_selection", lambda *args: None)


def select(*words: Any) -> int:
    return main(["select", *map(str, words), "--device", "cpu"])


def answer(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    document = json.loads((folder / "select.json").read_text())
    return document, {candidate["name"]: candidate for candidate in document["candidates"]}


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


def test_a_fitted_cascade(taught, images, capsys):
    """By the policy that the run's weights bring along; the command that runs it, runs."""
    job = prepare(taught / "config.yaml", torch.device("cpu"))
    ensemble: Any = job.student.eval()
    load_weights(ensemble, taught / "weights" / "ensemble.safetensors")
    data = [job.datasets["fake/val"][i] for i in range(12)]
    x, labels = torch.stack([image for image, _ in data]), torch.tensor([label for _, label in data])
    with torch.no_grad():
        first = ensemble.first(1)(x).softmax(-1).amax(-1)
    threshold = float(first.median())
    ensemble.policy = Confidence([threshold])
    save_weights(ensemble, taught / "weights" / "ensemble.safetensors")
    classes, macs = looked_up(ensemble, x, lambda logits, k: first > threshold)
    assert select(taught) == 0
    document, found = answer(taught / "select")
    (note,) = document["notes"]
    assert note == "The thresholds of cascade_confidence were fitted on these samples: on others it may do worse."
    assert note in capsys.readouterr().out
    cascade = found["cascade_confidence"]
    assert cascade["kind"] == "cascade" and cascade["params"] == found["ensemble_2"]["params"]
    assert cascade["accuracy"] == pytest.approx(100 * (classes == labels).double().mean().item())
    assert cascade["macs"] == pytest.approx(macs / 1e6) and cascade["latency"] > 0
    assert found["mamba_pkd_s1"]["macs"] < cascade["macs"] < found["ensemble_2"]["macs"]
    python, flag, code = shlex.split(cascade["how"])
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    assert capsys.readouterr().out.startswith("Prediction(logits=")
    folder = images("a", "b", "c")
    assert select(taught, "--data-root", folder, "-j", "0", "--output", "others") == 0
    document, found = answer(Path("others"))
    assert "cascade_confidence" in found and not document["notes"]


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


def test_students_that_are_not_active(taught, caplog):
    job = prepare(taught / "config.yaml", torch.device("cpu"))
    ensemble: Any = job.student.eval()
    load_weights(ensemble, taught / "weights" / "ensemble.safetensors")
    ensemble.policy = Confidence([0.5])
    ensemble.set_active([1])
    save_weights(ensemble, taught / "weights" / "ensemble.safetensors")
    assert select(taught) == 0
    assert set(answer(taught / "select")[1]) == {"test_resnet", "mamba_pkd_s2"}
    assert "The policy of run is left out: the thresholds are for the first 2 students" in caplog.text
