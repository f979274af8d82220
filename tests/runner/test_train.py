"""``mamba-pkd train`` and ``evaluate`` on tiny configs: what they train and what they leave."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torchdistill.common.main_util import load_ckpt
from torchdistill.core.training import TrainingBox
from torchvision.datasets import FakeData

from timm_mamba_pkd import MambaPKDEnsemble
from timm_mamba_pkd.cli import main
from timm_mamba_pkd.report import read_csv

STUDENTS = ["mamba_pkd_s1", "mamba_pkd_s2"]
SIZES: dict[str, Any] = {"num_classes": 3, "in_chans": 1}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def fresh() -> MambaPKDEnsemble:
    return MambaPKDEnsemble(STUDENTS, img_size=8, **SIZES)


def test_progressive_run_leaves_a_full_folder(progressive, run, write, tmp_path, fresh, caplog, capsys):
    progressive["train"]["init"]["kwargs"]["num_epochs"] = 2
    progressive["train"]["init"]["kwargs"]["scheduler"] = {"key": "StepLR", "kwargs": {"step_size": 1, "gamma": 0.5}}
    progressive["models"]["student_model"]["dst_ckpt"] = str(tmp_path / "new" / "ensemble.pt")
    with caplog.at_level(logging.INFO):
        code, folder = run(progressive)
    assert code == 0
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "log.txt", "metrics.jsonl", "weights", "results.csv", "results.md",
    }  # fmt: skip
    assert (folder / "config.yaml").read_bytes() == (tmp_path / "config.yaml").read_bytes()
    assert "stage 2  epoch 4/4  mamba_pkd_s2" in (folder / "log.txt").read_text()

    lines = metrics(folder)
    assert [(m["stage"], m["student"], m["epoch"], m["lr"]) for m in lines] == [
        (1, "mamba_pkd_s1", 0, 0.01),
        (1, "mamba_pkd_s1", 1, 0.005),
        (2, "mamba_pkd_s2", 2, 0.01),
        (2, "mamba_pkd_s2", 3, 0.005),
    ]
    for line in lines:
        assert set(line) == {
            "stage", "student", "epoch", "lr", "loss", "val_top1", "val_top1_student", "img_per_s", "seconds",
        }  # fmt: skip
        assert line["loss"] > 0 and line["seconds"] > 0
        assert line["img_per_s"] == pytest.approx(24 / line["seconds"])
        for name in ("val_top1", "val_top1_student"):
            assert line[name] * 12 / 100 == pytest.approx(round(line[name] * 12 / 100), abs=1e-4)
    assert lines[0]["val_top1"] == lines[0]["val_top1_student"]

    weights = {path.name: load_file(path) for path in (folder / "weights").iterdir()}
    assert set(weights) == {f"{k}_{name}.safetensors" for k, name in enumerate(STUDENTS, 1)} | {"ensemble.safetensors"}
    ensemble = weights["ensemble.safetensors"]
    assert ensemble["active"].tolist() == [True, True]
    for i, name in enumerate(STUDENTS):
        member = {n.removeprefix(f"students.{i}."): t for n, t in ensemble.items() if n.startswith(f"students.{i}.")}
        path = folder / "weights" / f"{i + 1}_{name}.safetensors"
        assert_equal(load_file(path), member)
        student = timm.create_model(name, img_size=8, **SIZES, checkpoint_path=str(path))
        for n, tensor in student.state_dict().items():
            assert torch.equal(tensor, member[n])

    # torchdistill reads dst_ckpt, and so does torch without unpickling anything but tensors.
    destination = tmp_path / "new" / "ensemble.pt"
    load_ckpt(str(destination), model=fresh)
    assert set(fresh.state_dict()) == set(ensemble)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, ensemble[name])
    assert set(torch.load(destination, weights_only=True)) == {"model"}
    assert not list(tmp_path.rglob("*.tmp"))

    rows = read_csv(folder / "results.csv")
    assert [(r.model, r.role, r.k) for r in rows] == [
        ("test_resnet", "teacher", None),
        ("mamba_pkd_s1", "student", 1),
        ("mamba_pkd_s2", "student", 2),
        ("ensemble_1", "ensemble", 1),
        ("ensemble_2", "ensemble", 2),
    ]
    printed = capsys.readouterr().out
    assert all(row.model in printed for row in rows)

    # The same numbers again, by every way to test.
    accuracies = [row.top1 for row in rows]
    for flags, command in (
        ([], "evaluate"),
        (["-test_only"], "train"),
        (["--checkpoint", str(destination)], "evaluate"),
        (["--checkpoint", str(folder / "weights" / "ensemble.safetensors")], "evaluate"),
    ):
        assert run(progressive, *flags, command=command)[0] == 0
        out = capsys.readouterr().out.splitlines()
        assert [float(line.split()[3 if "teacher" not in line else 2]) for line in out[1:6]] == pytest.approx(
            accuracies, abs=0.0051
        )
    assert [row.top1 for row in read_csv(folder / "results.csv")] == accuracies
    assert len(metrics(folder)) == 4

    assert run(progressive, "-student_only", "--checkpoint", str(destination), command="evaluate")[0] == 0
    assert not any(line.startswith("test_resnet") for line in capsys.readouterr().out.splitlines())


def test_report_is_there_with_plots_and_latency(plain, write, tmp_path):
    folder = tmp_path / "run"
    assert main(["train", "--config", str(write(plain)), "--device", "cpu", "--output", str(folder)]) == 0
    (row,) = read_csv(folder / "results.csv")
    assert 0.01 < row.ms_per_image < 10_000 and row.param_count > 0 and row.gmacs > 0
    for plot in ("accuracy_macs.png", "curves.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
        (folder / plot).unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "accuracy_macs.png").exists() and (folder / "curves.png").exists()


def test_logged_accuracy_is_that_of_the_saved_weights(progressive, run, fresh):
    progressive["test"]["test_data_loader"]["dataset_id"] = "fake/val"
    code, folder = run(progressive)
    assert code == 0
    rows = {(row.role, row.k): row.top1 for row in read_csv(folder / "results.csv")}
    first, second = metrics(folder)
    assert first["val_top1"] == rows["ensemble", 1] and first["val_top1_student"] == rows["student", 1]
    assert second["val_top1"] == rows["ensemble", 2] and second["val_top1_student"] == rows["student", 2]


def test_seed_decides(progressive, run):
    weights = []
    for number, flags in enumerate(([], [], ["--seed", "7"])):
        code, folder = run(progressive, *flags, output=f"run{number}")
        assert code == 0
        weights.append(load_file(folder / "weights" / "ensemble.safetensors"))
    assert_equal(weights[0], weights[1])
    assert not torch.equal(weights[0]["students.0.head.fc.weight"], weights[2]["students.0.head.fc.weight"])


def test_amp_trains_and_keeps_float32_weights(progressive, run):
    _, full = run(progressive, "--channels-last", output="full")
    losses = [line["loss"] for line in metrics(full)]
    code, folder = run(progressive, "--amp", "--channels-last")
    assert code == 0
    assert [line["loss"] for line in metrics(folder)] == pytest.approx(losses, rel=0.05)
    assert [line["loss"] for line in metrics(folder)] != losses
    weights = load_file(folder / "weights" / "ensemble.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.int64, torch.bool}
    progressive["train"]["init"]["kwargs"]["amp"] = True
    assert run(progressive, "--channels-last", output="by_config")[0] == 0
    assert_equal(weights, load_file(folder.parent / "by_config" / "weights" / "ensemble.safetensors"))


def test_float16_trains_with_scaled_gradients(progressive, run, errors, capsys):
    _, full = run(progressive, output="full")
    losses = [line["loss"] for line in metrics(full)]
    code, folder = run(progressive, "--amp", "--amp-dtype", "float16")
    assert code == 0
    assert [line["loss"] for line in metrics(folder)] == pytest.approx(losses, rel=0.02)
    weights = load_file(folder / "weights" / "ensemble.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.int64, torch.bool}
    checkpoint = torch.load(next((folder / "checkpoints").glob("stage2*")), weights_only=True)
    assert checkpoint["scaler"]["scale"] > 0
    progressive["train"]["init"]["kwargs"]["amp"] = "float16"
    assert run(progressive, output="by_config")[0] == 0
    assert_equal(weights, load_file(folder.parent / "by_config" / "weights" / "ensemble.safetensors"))
    capsys.readouterr()
    progressive["train"]["init"]["kwargs"]["amp"] = "half"
    assert run(progressive, output="other")[0] == 2
    assert errors()[0].endswith("train.amp must be True, False, bfloat16 or float16, got 'half'")
    progressive["train"]["init"]["kwargs"]["amp"] = False
    assert run(progressive, "--amp-dtype", "float16", output="other")[0] == 2
    assert errors() == ["--amp-dtype float16 does nothing without --amp"]


def test_plain_training_without_a_teacher(plain, run, tmp_path):
    plain["train"]["num_epochs"] = 12
    plain["test"]["topk"] = [3, 2]
    plain["datasets"]["fake/test"] = plain["datasets"]["fake/val"] = plain["datasets"]["fake/train"]
    code, folder = run(plain)
    assert code == 0
    lines = metrics(folder)
    assert [(m["stage"], m["student"], m["epoch"], m["val_top1_student"]) for m in lines] == [
        (1, None, epoch, None) for epoch in range(12)
    ]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]  # noise is learnt by heart
    (row,) = read_csv(folder / "results.csv")
    assert (row.model, row.role, row.k, row.macs_pct) == ("mamba_pkd_s1", "student", 1, None)
    assert row.top1 == lines[-1]["val_top1"] > 60
    assert [path.name for path in (folder / "weights").iterdir()] == ["model.safetensors"]
    model = timm.create_model("mamba_pkd_s1", **SIZES, checkpoint_path=str(folder / "weights" / "model.safetensors"))
    assert model.num_classes == 3


def test_upstream_config_of_torchvision_models_in_two_stages(plain, run, build):
    resnet = {"key": "resnet18", "kwargs": {"num_classes": 3}}
    plain["datasets"] = {
        f"fake/{split}": build.call(
            "torchvision.datasets.FakeData",
            size=8, image_size=[3, 8, 8], num_classes=3, transform=build.call("torchvision.transforms.ToTensor"),
        )
        for split in ("train", "val", "test")
    }  # fmt: skip
    plain["models"] = {"teacher_model": dict(resnet), "student_model": {**resnet, "src_ckpt": None}}
    sides = {"teacher": {"forward_proc": "forward_batch_only", "requires_grad": False}}
    sides["student"] = {"forward_proc": "forward_batch_only", "frozen_modules": ["conv1"]}
    second = build.stage(num_epochs=2, **sides)
    del second["train_data_loader"], second["val_data_loader"]  # those of stage 1 stay
    plain["train"] = {"log_freq": 1, "stage1": build.stage(**sides), "stage2": second}
    code, folder = run(plain)
    assert code == 0
    assert [(m["stage"], m["epoch"]) for m in metrics(folder)] == [(1, 0), (2, 1), (2, 2)]
    assert [(r.model, r.role) for r in read_csv(folder / "results.csv")] == [
        ("resnet18", "teacher"),
        ("resnet18", "student"),
    ]


def test_top_k_is_chosen_by_the_number_of_classes(plain, run, caplog):
    with caplog.at_level(logging.INFO):
        assert run(plain)[0] == 0
    assert any("Acc@1" in message for message in caplog.messages)
    assert not any("Acc@5" in message for message in caplog.messages)


def test_training_loader_shared_with_validation_and_test(plain, run):
    """One dictionary for all loaders, as a YAML alias makes it: torchdistill then marks them all as the training's."""
    shared = plain["train"]["train_data_loader"]
    plain["train"]["val_data_loader"] = {**shared, "requires_supp": True}
    plain["test"]["test_data_loader"] = {**shared, "requires_supp": True}
    assert run(plain)[0] == 0


def test_evaluate_without_a_run_writes_nothing(plain, run, tmp_path, capsys):
    code, folder = run(plain, command="evaluate")
    assert code == 2
    assert f"weights file {folder}/weights/model.safetensors does not exist" in capsys.readouterr().err
    assert not folder.exists()


def test_evaluate_finds_the_weights_at_dst_ckpt(plain, run, write, tmp_path, capsys, monkeypatch):
    plain["models"]["model"]["dst_ckpt"] = str(tmp_path / "model.pt")
    code, folder = run(plain)
    assert code == 0
    (row,) = read_csv(folder / "results.csv")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--config", str(write(plain)), "--device", "cpu"]) == 0
    assert f"{row.top1:.2f}" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert run(plain, command="evaluate", output="elsewhere")[0] == 2  # a folder that was named is not replaced
    assert "elsewhere/weights/model.safetensors does not exist" in capsys.readouterr().err


def test_evaluate_leaves_a_run_alone(plain, run, capsys):
    code, folder = run(plain)
    assert code == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(plain, "--seed", "7", command="evaluate")[0] == 0
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "results.csv").unlink()  # as when the run was killed before its test
    del before[folder / "results.csv"]
    assert run(plain, command="evaluate")[0] == 0
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_evaluate_takes_the_checkpoint_it_is_given(plain, run, tmp_path, capsys):
    code, folder = run(plain)
    assert code == 0
    report = (folder / "results.csv").read_bytes()
    model = timm.create_model("mamba_pkd_s1", **SIZES)
    shares = torch.zeros(3)
    for _, label in FakeData(21, (1, 8, 8), num_classes=3, random_offset=200):
        shares[label] += 1
    for answer in range(3):  # a model that always gives the same answer
        model.load_state_dict(model.state_dict() | {"head.fc.bias": 100.0 * torch.eye(3)[answer]})
        torch.save(model.state_dict(), tmp_path / "model.pt")
        capsys.readouterr()
        assert run(plain, "--checkpoint", str(tmp_path / "model.pt"), command="evaluate")[0] == 0
        assert float(capsys.readouterr().out.splitlines()[1].split()[3]) == pytest.approx(
            100 * shares[answer].item() / 21, abs=0.0051
        )
    assert (folder / "results.csv").read_bytes() == report  # which is that of the run's own weights


def test_loss_of_an_epoch_is_the_mean_over_samples(plain, run, monkeypatch):
    forward, seen = TrainingBox.forward_process, []

    def forward_process(self, images, targets, supp_dict):
        loss = forward(self, images, targets, supp_dict)
        seen.append((loss.item(), len(targets)))
        return loss

    monkeypatch.setattr(TrainingBox, "forward_process", forward_process)
    plain["train"]["train_data_loader"]["kwargs"]["batch_size"] = 10
    plain["train"]["optimizer"]["grad_accum_step"] = 3  # torchdistill then scales the loss in place
    _, folder = run(plain)
    assert [size for _, size in seen[-3:]] == [10, 10, 4]
    (line,) = metrics(folder)
    assert line["loss"] == pytest.approx(sum(loss * size for loss, size in seen[-3:]) / 24)


def test_logs_of_two_runs_in_one_process_are_apart(plain, run, caplog):
    with caplog.at_level(logging.INFO):
        _, first = run(plain, output="first")
        before = (first / "log.txt").read_text()
        _, second = run(plain, "--run_log", str(first.parent / "other" / "log.txt"), "-log_config", output="second")
    assert (first / "log.txt").read_text() == before
    assert not (second / "log.txt").exists()
    assert "forward_batch_only" in (first.parent / "other" / "log.txt").read_text()
    assert "forward_batch_only" not in before
