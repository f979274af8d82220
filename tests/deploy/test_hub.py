"""Folders of the hub: they load as any of timm's, and what timm would upload is complete."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from timm.data import resolve_data_config
from timm.models import push_to_hf_hub
from torch import nn

from timm_mamba_pkd.deploy import first_students, write_hub_folder
from timm_mamba_pkd.models import Confidence

SIZES: dict[str, Any] = {"in_chans": 1, "img_size": (9, 8), "num_classes": 4}
NAMES = ["mamba_pkd_s1", "mamba_pkd_s2", "mamba_pkd_s1"]


def make_ensemble(**kwargs) -> Any:
    torch.manual_seed(0)
    ensemble: Any = timm.create_model("mamba_pkd_ensemble", students=NAMES, **SIZES, **kwargs)
    for student in ensemble.students:
        nn.init.normal_(student.head.fc.weight)
    if ensemble.weights is not None:
        ensemble.weights.uniform_()
    return ensemble.eval()


@pytest.mark.parametrize("combination", ["mean", "per_student", "per_class"])
@pytest.mark.parametrize("k", [1, 2, 3])
@torch.no_grad()
def test_first_students(combination, k):
    ensemble = make_ensemble(combination=combination)
    ensemble.connect(1, 1)
    nn.init.normal_(ensemble.reuse["1"].projections[0].weight)
    ensemble.set_active([1])
    x = torch.randn(2, 1, 9, 8)
    smaller = first_students(ensemble, k, (9, 8))
    torch.testing.assert_close(smaller(x), ensemble.first(k)(x), rtol=0, atol=0)
    assert smaller.names == ensemble.names[:k] and smaller.num_active == k
    assert not {p.data_ptr() for p in smaller.parameters()} & {p.data_ptr() for p in ensemble.parameters()}


@torch.no_grad()
def test_first_students_keep_pooling_and_preprocessing():
    ensemble = make_ensemble(global_pool="catavgmax")
    ensemble.pretrained_cfg.update(mean=(0.25,), std=(0.75,))
    smaller: Any = first_students(ensemble, 2, (9, 8))
    x = torch.randn(2, 1, 9, 8)
    torch.testing.assert_close(smaller(x), ensemble.first(2)(x), rtol=0, atol=0)
    assert smaller.pretrained_cfg["mean"] == (0.25,) and smaller.pretrained_cfg["std"] == (0.75,)


def student() -> Any:
    torch.manual_seed(0)
    return timm.create_model("mamba_pkd_s1", **SIZES).eval()


def ensemble_with_connections() -> Any:
    ensemble = make_ensemble(combination="per_class")
    ensemble.connect(2, 2)
    nn.init.normal_(ensemble.reuse["2"].projections[0].weight)
    return ensemble


MODELS = pytest.mark.parametrize("make", [student, make_ensemble, ensemble_with_connections])


@MODELS
@torch.no_grad()
def test_round_trip(make, tmp_path):
    model, folder = make(), tmp_path / "name-of-the-model"
    data = {"mean": (0.25,), "std": (0.5,)}
    write_hub_folder(model, folder, (1, 9, 8), data, {"Recipe": "stir"})
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 1, 9, 8)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    found = resolve_data_config(model=loaded)
    assert (found["input_size"], *found["mean"], *found["std"]) == ((1, 9, 8), 0.25, 0.5)

    card: Any = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "timm" and card.data.license == "mit"
    assert "# name-of-the-model" in card.text and "## Recipe\n\nstir" in card.text
    assert f"parameters: {sum(p.numel() for p in model.parameters()):,}" in card.text


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("k", [2, 3])
def test_policy(measure, k, tmp_path):
    """It goes with the folder, cut to the students that do, and the card describes it and what was measured of it."""
    whole = ensemble_with_connections()
    whole.policy = Confidence([0.625, 0.375], [1.5, 1.25, 0.75], measure)
    model = first_students(whole, k, (9, 8))
    write_hub_folder(model, tmp_path, (1, 9, 8), sections={"Early exit": "It saves half.", "Recipe": "stir"})
    loaded: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(20, 1, 9, 8)
    found, true = loaded.predict(x), model.predict(x)
    assert torch.equal(found.logits, true.logits) and torch.equal(found.students, true.students)
    assert loaded.policy.temperatures == whole.policy.temperatures[:k]

    text = (tmp_path / "README.md").read_text()
    assert "found = model.predict(x)  # images (B, 1, 9, 8)" in text
    section = text.partition("\n## Early exit\n")[2].partition("\n## ")[0]
    assert f"(`{measure}`)" in section and section.endswith("\n\nIt saves half.\n")
    rows = ["| 1 | 1.5 | 0.625 |", "| 2 | 1.25 | 0.375 |", "| 3 | 0.75 |  |"]
    assert "\n".join(rows if k == 3 else [rows[0], "| 2 | 1.25 |  |"]) in section
    assert text.count("## Early exit") == 1 and "## Recipe\n\nstir" in text


def test_no_early_exit_without_a_policy(tmp_path):
    write_hub_folder(make_ensemble(), tmp_path, (1, 9, 8))
    text = (tmp_path / "README.md").read_text()
    assert "Early exit" not in text and "predict" not in text


def test_fine_tuning_to_another_class_count(tmp_path):
    write_hub_folder(student(), tmp_path, (1, 9, 8))
    model: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2)
    assert model(torch.randn(2, 1, 9, 8)).shape == (2, 2)
    assert torch.equal(model.stem.conv.weight, student().stem.conv.weight)


@MODELS
def test_what_timm_uploads(make, tmp_path, monkeypatch):
    uploaded: dict[str, bytes] = {}

    class Api:
        def __init__(self, **kwargs) -> None: ...

        def create_repo(self, repo_id: str, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **kwargs) -> bool:
            return False

        def upload_folder(self, folder_path: str, **kwargs) -> None:
            uploaded.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})

    monkeypatch.setattr("timm.models._hub.HfApi", Api)
    model = make()
    push_to_hf_hub(model, "owner/model", safe_serialization=True)
    assert set(uploaded) == {"config.json", "model.safetensors", "README.md"}
    assert json.loads(uploaded["config.json"])["architecture"] == model.pretrained_cfg["architecture"]
    for name, content in uploaded.items():
        (tmp_path / name).write_bytes(content)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 1, 9, 8)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
