"""``--model-ema``: the average is what is validated, saved and handed on; training goes on from the raw weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from timm_mamba_pkd.runner.average import WeightAverage
from timm_mamba_pkd.runner.step import Step

FLAGS = ("--model-ema", "--model-ema-decay", "0.75")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def mean(tensor: torch.Tensor) -> float:
    return tensor.double().mean().item()


def test_average_and_exchange():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.75)
    seen = []
    for step in range(1, 5):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(step)
        average.update()
        # timm's: the first update takes the weights as they are
        seen.append(1.0 if step == 1 else 0.75 * seen[-1] + 0.25 * step)
        assert mean(average.average.module.state_dict()["0.weight"]) == pytest.approx(seen[-1])
    parameter = model.get_parameter("0.weight")
    average.swap()
    assert model.get_parameter("0.weight") is parameter and mean(parameter) == pytest.approx(seen[-1])
    assert model.state_dict()["1.num_batches_tracked"] == 4
    again = WeightAverage(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 0.75)
    again.load_state_dict(average.state_dict())
    assert again.updates == 4 and mean(again.average.module.state_dict()["0.weight"]) == 4
    average.swap()
    assert mean(parameter) == 4


def test_plain_run_saves_the_average_and_trains_on_from_the_weights(plain, run, monkeypatch):
    plain["train"]["num_epochs"] = 2
    plain["train"]["optimizer"]["grad_accum_step"] = 2
    plain["test"]["test_data_loader"]["dataset_id"] = "fake/val"
    trained: list[dict[str, torch.Tensor]] = []
    step = Step._step_optimizer

    def record(self: Step, box: Any) -> None:
        step(self, box)
        trained.append({name: tensor.clone() for name, tensor in box.model.state_dict().items()})

    monkeypatch.setattr(Step, "_step_optimizer", record)
    _, raw = run(plain, output="raw")
    trained.clear()
    code, folder = run(plain, *FLAGS)
    assert code == 0 and len(trained) == 3
    assert [line["loss"] for line in metrics(raw)] == [line["loss"] for line in metrics(folder)]
    for name, tensor in load_file(folder / "weights" / "model.safetensors").items():
        first, second, third = (state[name].double() for state in trained)
        expected = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third if tensor.is_floating_point() else third
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-5)
    table = (folder / "results.csv").read_text()
    assert f",{metrics(folder)[-1]['val_top1']:.2f}," in table or str(metrics(folder)[-1]["val_top1"])[:5] in table


def test_later_stages_get_the_average(progressive, run, tmp_path):
    progressive["train"]["init"]["kwargs"]["rule"] = "residual"
    progressive["models"]["student_model"]["dst_ckpt"] = str(tmp_path / "ensemble.safetensors")
    _, raw = run(progressive, output="raw")
    (tmp_path / "ensemble.safetensors").unlink()
    code, folder = run(progressive, *FLAGS)
    assert code == 0
    losses = [[line["loss"] for line in metrics(f)] for f in (raw, folder)]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]
    ensemble = load_file(tmp_path / "ensemble.safetensors")
    assert torch.equal(
        ensemble["students.0.head.fc.weight"],
        load_file(folder / "weights" / "1_mamba_pkd_s1.safetensors")["head.fc.weight"],
    )
    others = load_file(raw / "weights" / "ensemble.safetensors")
    for k in (0, 1):
        assert not torch.equal(ensemble[f"students.{k}.head.fc.weight"], others[f"students.{k}.head.fc.weight"])
