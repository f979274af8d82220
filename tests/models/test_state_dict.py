"""Checkpoints of another architecture, class count or channel count, by every way that timm loads them."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import load_checkpoint, save_for_hf
from torch import Tensor

from timm_mamba_pkd.models import STUDENTS, save_weights
from timm_mamba_pkd.models.combination import uniform_weights

S1, S2 = "mamba_pkd_s1", "mamba_pkd_s2"
ENSEMBLE = {"model_name": "mamba_pkd_ensemble", "students": [S1, "test_resnet"]}


STEMS = ("students.0.stem.conv.weight", "students.1.conv1.0.weight")


def make(model_name: str = S1, **kwargs) -> Any:
    return timm.create_model(model_name, **{"num_classes": 10, **kwargs})


def checkpoint_path(path: Path, **kwargs) -> Any:
    return make(**kwargs, checkpoint_path=str(path))


def checkpoint_path_without_num_classes(path: Path, **kwargs) -> Any:
    return checkpoint_path(path, **{**kwargs, "num_classes": None})


def later(path: Path, **kwargs) -> Any:
    model = make(**kwargs)
    load_checkpoint(model, str(path))
    return model


def pretrained(path: Path, **kwargs) -> Any:
    return make(**kwargs, pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 10})


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def saved(tmp_path: Path, **kwargs) -> tuple[Path, dict[str, Tensor]]:
    model = make(**kwargs)
    save_weights(model, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", model.state_dict()


@pytest.mark.parametrize(
    ("load", "of", "into", "message"),
    [
        (
            checkpoint_path,
            {"model_name": S2},
            {},
            "unexpected stages.0.blocks.0.depthwise.norm.num_batches_tracked, .*, ...; shape of stages",
        ),
        (
            later,
            {"model_name": S2},
            {},
            r"shape of stages.0.downsample.project.conv.weight \(16, 16, 1, 1\) instead of \(12, 16, 1, 1\)",
        ),
        (pretrained, {"model_name": S2}, {}, r"another architecture than this MambaPKD: unexpected stages.0.blocks.0"),
        (pretrained, {"model_name": S2}, {"num_classes": 7}, "another architecture than this MambaPKD: unexpected"),
        (
            pretrained,
            {"model_name": "test_resnet"},
            {"num_classes": 7},
            "architecture than this MambaPKD: missing",
        ),
        (checkpoint_path, {"in_chans": 1}, {}, r"in_chans=3: shape of stem.conv.weight \(8, 1, 3, 3\) instead of"),
        (
            checkpoint_path_without_num_classes,
            {},
            {},
            r"num_classes=1000, in_chans=3: shape of head.fc.weight \(10, 32\) instead of \(1000, 32\), head.fc.bias "
            r"\(10,\) instead of \(1000,\) \(create the model with the state dict's num_classes\)$",
        ),
        (checkpoint_path, {"num_classes": 5, "model_name": S2}, {}, "; shape of .*, ...$"),
        (
            checkpoint_path_without_num_classes,
            ENSEMBLE,
            ENSEMBLE,
            r"this MambaPKDEnsemble with num_classes=1000, in_chans=3: shape of students.0.head.fc.weight \(10, 32\)",
        ),
        (
            checkpoint_path,
            {"model_name": S1},
            ENSEMBLE,
            r"MambaPKDEnsemble .*: missing active, .*; unexpected stages",
        ),
    ],
)
def test_another_model(tmp_path, load: Callable, of, into, message):
    path, _ = saved(tmp_path, **of)
    with pytest.raises(RuntimeError, match=message) as error:
        load(path, **into)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("load", [checkpoint_path, later])
@pytest.mark.parametrize("num_classes", [7, 1000, 0])
def test_fine_tuning_to_another_class_count(tmp_path, caplog, load, num_classes):
    path, state = saved(tmp_path)
    torch.manual_seed(1)
    fresh = make(num_classes=num_classes).state_dict()
    torch.manual_seed(1)
    model = load(path, num_classes=num_classes)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, (fresh if name.startswith("head") else state)[name], rtol=0, atol=0)
    (record,) = [record for record in caplog.records if record.name.startswith("timm_mamba_pkd")]
    assert record.levelno == logging.WARNING
    assert "The classifier starts anew" in record.message and "head.fc.weight" in record.message
    assert model(torch.randn(2, 3, 9, 9)).shape == (2, num_classes or model.num_features)


@pytest.mark.parametrize("into", [{}, ENSEMBLE])
@pytest.mark.parametrize("load", [checkpoint_path, later])
def test_a_file_without_a_classifier_is_refused(tmp_path, load, into):
    """One of another class count is there, and starts anew; one that is gone is damage."""
    state = saved(tmp_path, **into)[1]
    torch.save({name: tensor for name, tensor in state.items() if ".fc." not in name}, tmp_path / "w.pth")
    for num_classes in (7, 10):
        with pytest.raises(RuntimeError, match=r": missing (students\.0\.)?head\.fc\.weight, [^;]*$"):
            load(tmp_path / "w.pth", **into, num_classes=num_classes)


@pytest.mark.parametrize("into", [{}, {**ENSEMBLE, "combination": "per_class"}])
@pytest.mark.parametrize("strict", [True, False])
def test_only_the_first_weights_are_adapted(tmp_path, into, strict):
    """What is new is said to be missing, if not strict; later loads are as in torch, and leave all as it is."""
    state = saved(tmp_path, **into)[1]
    model = make(**into, num_classes=7)
    with pytest.raises(RuntimeError, match="missing"):
        model.load_state_dict({})
    new = [name for name in state if ".fc." in name]
    keys = model.load_state_dict(state, strict=strict)
    assert (keys.missing_keys, keys.unexpected_keys) == ([] if strict else new, [])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for later_strict in (True, False):
        with pytest.raises(RuntimeError, match=r"head\.fc\.weight \(10, 32\) instead of \(7, 32\)"):
            model.load_state_dict(state, strict=later_strict)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    model.load_state_dict(before)


@pytest.mark.parametrize("into", [{}, {**ENSEMBLE, "students": list(STUDENTS)}])
def test_pretrained_weights_are_the_first_ones(tmp_path, into):
    state = saved(tmp_path, **into)[1]
    model = pretrained(tmp_path / "weights.safetensors", **into, num_classes=7)
    with pytest.raises(RuntimeError, match="create the model with the state dict's num_classes"):
        model.load_state_dict(state)


def test_a_damaged_classifier_of_the_same_class_count_is_refused(tmp_path):
    state = saved(tmp_path)[1]
    del state["head.fc.bias"]
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(RuntimeError, match=r"missing head\.fc\.bias"):
        checkpoint_path(tmp_path / "damaged.pth", num_classes=10)


def test_fine_tuning_an_ensemble_to_another_class_count(tmp_path):
    path, state = saved(tmp_path, **ENSEMBLE)
    model = checkpoint_path(path, **ENSEMBLE, num_classes=7)
    for name, tensor in model.state_dict().items():
        if name.endswith(("head.fc.weight", "head.fc.bias", ".1.fc.weight", ".1.fc.bias")):
            assert len(tensor) == 7
        else:
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


@pytest.mark.parametrize("combination", ["mean", "per_student", "per_class"])
@pytest.mark.parametrize("how", ["checkpoint_path", "local-dir"])
def test_fine_tuning_a_fitted_ensemble(tmp_path, caplog, how, combination):
    """With the classifiers, the combination starts anew, at the mean; connections and active students stay."""
    students = [S1, S1, "test_resnet"]
    ensemble = make("mamba_pkd_ensemble", students=students, combination=combination)
    ensemble.connect(1, 1)
    ensemble.set_active(2)
    if ensemble.weights is not None:
        ensemble.weights.uniform_()
    if how == "local-dir":
        save_for_hf(ensemble, str(tmp_path), safe_serialization=True)
        model: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    else:
        save_weights(ensemble, tmp_path / "w.safetensors")
        path = tmp_path / "w.safetensors"
        model = checkpoint_path(
            path, model_name="mamba_pkd_ensemble", students=students, combination=combination, num_classes=7
        )
    (record,) = [record for record in caplog.records if record.name.startswith("timm_mamba_pkd")]
    assert record.levelno == logging.WARNING and "The classifier starts anew" in record.message
    state = ensemble.state_dict()
    for name, tensor in model.state_dict().items():
        if name == "weights":
            expected = uniform_weights(3, 7, combination)
            assert expected is not None
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
        elif tensor.shape == state[name].shape:
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
        else:
            assert ".fc." in name and len(tensor) == 7
    assert model.combination == combination and model.num_active == 2
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_a_damaged_folder_is_refused_for_another_class_count_too(tmp_path):
    save_for_hf(make(**ENSEMBLE), str(tmp_path))
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    del state["students.0.norm.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    other: dict[str, Any] = {"num_classes": 7}
    for kwargs in ({}, other):
        with pytest.raises(RuntimeError, match=r"MambaPKDEnsemble: missing students\.0\.norm\.weight$"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **kwargs)


@pytest.mark.parametrize("load", [checkpoint_path, later, pretrained])
@pytest.mark.parametrize("name", ["norm.weight", "head.fc.weight"])
def test_weights_of_integers_are_refused(tmp_path, load, name):
    state = saved(tmp_path)[1]
    state[name] = state[name].to(torch.int64)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match=f"dtype of {name} torch.int64 instead of torch.float32$"):
        load(tmp_path / "weights.pth")


def test_a_classifier_with_one_tensor_too_many_is_refused():
    ensemble = make("mamba_pkd_ensemble", students=[S1], combination="per_student")
    ensemble.students[0].head.fc.bias = None
    state = {**ensemble.state_dict(), "students.0.head.fc.bias": torch.zeros(10)}
    with pytest.raises(RuntimeError, match=r"unexpected students\.0\.head\.fc\.bias"):
        ensemble.load_state_dict(state)


def test_weights_of_another_precision_are_not(tmp_path):
    state = saved(tmp_path)[1]
    torch.save({name: t.half() if t.is_floating_point() else t for name, t in state.items()}, tmp_path / "w.pth")
    model = checkpoint_path(tmp_path / "w.pth")
    torch.testing.assert_close(model.norm.weight, state["norm.weight"].half().float())


def test_fine_tuning_to_other_channels_and_classes(tmp_path):
    """timm's own way: as pretrained weights, whose file and class count the overlay names."""
    path, state = saved(tmp_path)
    model = pretrained(path, num_classes=7, in_chans=1)
    torch.testing.assert_close(model.stem.conv.weight, state["stem.conv.weight"].sum(1, keepdim=True))
    torch.testing.assert_close(model.norm.weight, state["norm.weight"], rtol=0, atol=0)


def test_fine_tuning_an_ensemble_to_other_channels(tmp_path):
    """Whatever its students call their first convolutions."""
    ensemble = make(**ENSEMBLE)
    save_for_hf(ensemble, str(tmp_path), safe_serialization=True)
    model: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)
    for name, tensor in ensemble.state_dict().items():
        expected = tensor.sum(1, keepdim=True) if name in STEMS else tensor
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0, atol=0)


def test_the_class_count_that_was_not_given_is_not_adapted(tmp_path):
    """A forgotten ``num_classes`` is an error, not a new classifier of 1000 classes; neither loads anything."""
    path, _ = saved(tmp_path)
    model = make(num_classes=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="create the model with the state dict's num_classes"):
        load_checkpoint(model, str(path))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_not_strict(tmp_path):
    """Names may be missing or unexpected then, as in torch."""
    model, state = make(), make().state_dict()
    del state["norm.weight"]
    state["other"] = torch.zeros(1)
    keys = model.load_state_dict(state, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["norm.weight"], ["other"])
    with pytest.raises(RuntimeError, match=r"missing norm.weight; unexpected other$"):
        model.load_state_dict(state)
    state["stem.conv.weight"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"shape of stem.conv.weight \(2,\)"):
        model.load_state_dict(state, strict=False)
