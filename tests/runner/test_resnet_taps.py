"""Losses written for a ResNet student, on one of ours."""

from typing import Any

import pytest
import timm

from timm_mamba_pkd.models import load_weights
from timm_mamba_pkd.report import count_params, read_csv

SIZES: dict[str, Any] = {"num_classes": 5, "in_chans": 3}


def between(path: str, io: str, roles: tuple[str, str] = ("student", "teacher")) -> dict[str, str]:
    return {f"{role}_module_{key}": value for role in roles for key, value in (("path", path), ("io", io))}


def mse(path: str) -> dict[str, Any]:
    paths = {"module_path": path, "io": "output"}
    kwargs = {"input": {"is_from_teacher": False, **paths}, "target": {"is_from_teacher": True, **paths}}
    return {"key": "SimpleLossWrapper", "kwargs": kwargs}


def feature_pairs(student: str, teacher: str) -> dict[str, Any]:
    return {"student": {"io": "output", "path": student}, "teacher": {"io": "output", "path": teacher}, "weight": 1}


@pytest.fixture
def config(plain, build) -> dict[str, Any]:
    """Cross-entropy only; ResNet-18 is the teacher."""
    to_tensor = build.call("torchvision.transforms.ToTensor")
    for split, offset in (("train", 0), ("val", 100), ("test", 200)):
        plain["datasets"][f"fake/{split}"] = build.call(
            "torchvision.datasets.FakeData",
            size=8, image_size=[3, 40, 40], num_classes=5, random_offset=offset, transform=to_tensor,
        )  # fmt: skip
    taps = {"key": "mamba_pkd_resnet_taps", "kwargs": {"model_name": "mamba_pkd_s1", **SIZES}}
    plain["models"] = {"teacher_model": {"key": "resnet18", "kwargs": {"num_classes": 5}}, "student_model": taps}
    del plain["train"]["model"]
    plain["train"]["teacher"] = {"forward_proc": "forward_batch_only", "requires_grad": False}
    plain["train"]["student"] = {"forward_proc": "forward_batch_only", "requires_grad": True}
    return plain


def test_hooks(config, run):
    """AT, PKT, avgpool's MSE (CSE + L2) and DIST+, at once."""
    stage = config["train"]
    for role in ("teacher", "student"):
        stage[role]["forward_hook"] = {"input": ["fc"], "output": ["layer3", "layer4", "avgpool"]}
    pairs = {layer: feature_pairs(layer, layer) for layer in ("layer3", "layer4")}
    features = between("layer4", "output", ("student_feature", "teacher_feature"))
    logits = between(".", "output", ("student_logit", "teacher_logit"))
    terms = {
        "at": {"criterion": {"key": "ATLoss", "kwargs": {"at_pairs": pairs, "mode": "code"}}},
        "pkt": {"criterion": {"key": "PKTLoss", "kwargs": between("fc", "input")}},
        "l2": {"criterion": {"key": "MSELoss", "kwargs": {}}, "criterion_wrapper": mse("avgpool")},
        "dist": {"criterion": {"key": "DISTPlusLoss", "kwargs": {**features, **logits}}},
    }
    stage["criterion"]["kwargs"]["sub_terms"] |= {name: {**term, "weight": 1.0} for name, term in terms.items()}
    assert_student_trained(*run(config))


def test_srd(config, run):
    stage = config["train"]
    norm = {"num_features": 512, "eps": 0.0001, "affine": False}
    for role, more in (("teacher", {}), ("student", {"linear_kwargs": {"in_features": 512, "out_features": 512}})):
        kwargs = {"input_module": {"path": "model.layer4", "io": "output"}, "norm_kwargs": norm, **more}
        stage[role]["auxiliary_model_wrapper"] = {"key": "SRDModelWrapper", "kwargs": kwargs}
        stage[role]["forward_hook"] = {"output": ["model.layer4", "norm_layer"]}
    features = between("norm_layer", "output", ("student_feature", "teacher_feature"))
    logits = between(".", "output", ("student_linear", "teacher_linear"))
    srd = {"key": "SRDLoss", "kwargs": {**features, **logits, "exponent": 4.0}}
    stage["criterion"]["kwargs"]["sub_terms"]["srd"] = {"criterion": srd, "weight": 1.0}
    assert_student_trained(*run(config))


def test_ickd(config, run):
    stage = config["train"]
    embed = {"path": "student_model.layer4", "io": "output", "in_channels": 512, "out_channels": 512}
    wrapper = {"key": "Student4ICKD", "kwargs": {"embeddings": {"embed1": embed}}}
    stage["student"] |= {
        "auxiliary_model_wrapper": wrapper,
        "forward_hook": {"output": ["student_model.layer4", "embed_dict.embed1"]},
    }
    stage["teacher"]["forward_hook"] = {"output": ["layer4"]}
    pairs = {"pair1": feature_pairs("embed_dict.embed1", "layer4")}
    cs = {"criterion": {"key": "ChSimLoss", "kwargs": {"feature_pairs": pairs}}, "weight": 1.0}
    stage["criterion"]["kwargs"]["sub_terms"]["cs"] = cs
    assert_student_trained(*run(config))


def test_a_wrong_layer_is_named(config, run, capsys):
    config["train"]["student"]["forward_hook"] = {"output": ["layer5"]}
    assert run(config)[0] == 2
    assert "'layer5' is no module of ResNetTaps, which has student, layer1, layer2" in capsys.readouterr().err


def assert_student_trained(code, folder) -> None:
    assert code == 0
    student: Any = timm.create_model("mamba_pkd_s1", **SIZES)
    load_weights(student, folder / "weights" / "model.safetensors")
    assert student.stem.norm.num_batches_tracked == 1
    row = read_csv(folder / "results.csv")[-1]
    assert row.model == "mamba_pkd_s1" and row.param_count == count_params(student) / 1e6
