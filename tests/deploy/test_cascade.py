"""The cascade in ONNX Runtime: it predicts as the ensemble does, and says in one line what is wrong with its folder."""

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_mamba_pkd.deploy import FORMATS, OnnxCascade, write_cascade
from timm_mamba_pkd.models import Agreement, Budget, Confidence, Depth

pytestmark = pytest.mark.skipif(bool(FORMATS["onnx"].missing()), reason="ONNX's packages are not installed")
SIZE = (1, 8, 9)
NAMES = ["mamba_pkd_s1", "mamba_pkd_s1", "test_efficientnet"]
POLICY = Confidence([0.6, 0.5], [1.5, 1.0, 0.7], "margin")


def make(**kwargs: Any) -> Any:
    names: Any = {"students": NAMES, "combination": "per_class"}
    return timm.create_model(
        "mamba_pkd_ensemble", **names, in_chans=1, img_size=SIZE[1:], num_classes=4, **kwargs
    ).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module")
@torch.no_grad()
def written(tmp_path_factory) -> Any:
    """An ensemble, whose students are sure of different images, and its folder."""
    torch.manual_seed(0)
    ensemble, exportable = make(), make(exportable=True)
    for student in ensemble.students:
        nn.init.normal_(student.get_classifier().weight)
        student.get_classifier().weight *= 2 / student(images(32)).std()
    ensemble.weights *= 1 + torch.rand_like(ensemble.weights)
    ensemble.connect(1, 1)
    for parameter in ensemble.reuse.parameters():
        nn.init.normal_(parameter, std=0.1)
    ensemble.policy = POLICY
    exportable.load_state_dict(ensemble.state_dict())
    folder = tmp_path_factory.mktemp("cascade") / "new"
    write_cascade(exportable, images(2), folder)
    return ensemble, folder


@pytest.mark.parametrize("count", [1, 7, 50])
@pytest.mark.parametrize(
    "policy",
    [None, Confidence([0.7, 0.7]), Agreement(), Agreement(2), Depth(1), Depth(3), Budget(macs=1e8)],
    ids=str,
)
def test_predicts_as_the_ensemble(policy, count, written):
    ensemble, folder = written
    if isinstance(policy, Budget):
        policy = Budget(macs=count * sum(ensemble.step_macs(SIZE)) / 2)
    _assert_predicts_the_same(ensemble, OnnxCascade(folder), images(count), policy)


def test_every_student_is_somebodys_last(written):
    assert set(OnnxCascade(written[1]).predict(images(50)).students.tolist()) == {1, 2, 3}


def test_milliseconds(written):
    ensemble, folder = written
    cascade = OnnxCascade(folder)
    for timed in (ensemble, cascade):
        Budget.measure(timed, images(3))
    _assert_predicts_the_same(ensemble, cascade, images(3), Budget(milliseconds=1e6))


def test_images_of_another_layout(written):
    ensemble, folder = written
    x = images(8).transpose(2, 3).contiguous().transpose(2, 3)
    _assert_predicts_the_same(ensemble, OnnxCascade(folder), x.requires_grad_(), None)


def test_mean(written, tmp_path):
    ensemble, folder = written[0], shutil.copytree(written[1], tmp_path / "copy")
    document = json.loads((folder / "cascade.json").read_text())
    mean = copy.deepcopy(ensemble)
    mean.set_combination("mean")
    (folder / "cascade.json").write_text(json.dumps(document | {"weights": None, "step_macs": mean.step_macs(SIZE)}))
    _assert_predicts_the_same(mean, OnnxCascade(folder), images(20), Confidence([0.7, 0.7]))


def _assert_predicts_the_same(ensemble: Any, cascade: OnnxCascade, x: Tensor, policy: Any) -> None:
    true, found = ensemble.predict(x, policy), cascade.predict(x, policy)
    assert found.students.tolist() == true.students.tolist()
    assert found.macs == true.macs
    torch.testing.assert_close(found.logits, true.logits, rtol=1e-4, atol=1e-4)


def test_bad_images_and_policies(written):
    cascade = OnnxCascade(written[1])
    cascade.policy = None
    with pytest.raises(ValueError, match="there is no policy: fit one by mamba-pkd calibrate, or give one"):
        cascade.predict(images(2))
    of_shape = torch.zeros(1, *SIZE)
    for x in (torch.zeros(1, 1, 8, 8), of_shape.double(), of_shape.byte(), of_shape.to("meta")):
        with pytest.raises(ValueError, match=r"the graphs take images \(B, 1, 8, 9\), float32 on the CPU, got"):
            cascade.predict(x)
    for x in (torch.zeros(0, *SIZE), torch.zeros(SIZE), None):
        bad: Any = x
        with pytest.raises(ValueError, match=r"images must be a tensor \(B, 1, H, W\) of at least one image"):
            cascade.predict(bad)
    for policy, message in (
        (Depth(4), "k must be a whole number from 1 to 3"),
        (Confidence([0.5]), "the thresholds are for the first 2 students, and 1, 2, 3 are active"),
        (Budget(macs=1), "does not suffice for the first student"),
        ("confidence", "policy must be a Confidence, Agreement, Budget or Depth"),
    ):
        wrong: Any = policy
        with pytest.raises(ValueError, match=message):
            cascade.predict(images(2), wrong)


BAD_FIELDS = {
    "num_students": (0, "num_students must be a whole number from 1 up, got 0"),
    "num_classes": ("4", "num_classes must be a whole number from 1 up, got '4'"),
    "input_size": ([1, 9], "input_size must be a list of 3 numbers, got [1, 9]"),
    "step_macs": ([1, 2, -3], "step_macs must be a whole number from 1 up, got -3"),
    "weights": ([[1, 0], [0.5, 0.5]], "weights must be finite and (3, 3) or (3, 3, 4), got (2, 2)"),
    "sha256": (["0"], "sha256 must be a list of 3 digests, got ['0']"),
    "policy": (
        {"measure": "max_prob", "thresholds": [0.5, 1.5], "temperatures": [1, 1, 1]},
        "thresholds must be numbers from 0 to 1, got 1.5",
    ),
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_wrong_json(field, written, tmp_path):
    value, message = BAD_FIELDS[field]
    folder = shutil.copytree(written[1], tmp_path / "copy")
    document = json.loads((folder / "cascade.json").read_text())
    (folder / "cascade.json").write_text(json.dumps(document | {field: value}))
    _assert_says(folder, f"{folder}/cascade.json is damaged: {message}")


def test_policy_of_another_number_of_students(written, tmp_path):
    folder = shutil.copytree(written[1], tmp_path / "copy")
    document = json.loads((folder / "cascade.json").read_text())
    for count in (2, 4):
        document["policy"] |= {"thresholds": [0.5] * (count - 1), "temperatures": [1] * count}
        (folder / "cascade.json").write_text(json.dumps(document))
        _assert_says(folder, f"{folder}/cascade.json is damaged: the policy is for {count} students, not 3")


def test_damaged_folder(written, tmp_path):
    _assert_says(tmp_path / "nowhere", f"{tmp_path}/nowhere holds no cascade: there is no cascade.json in it")
    folder = shutil.copytree(written[1], tmp_path / "copy")
    text = (folder / "cascade.json").read_text()
    for content, message in (
        (text[:50], ""),
        ("[]", "it must hold num_students, "),
        ("{}", "it must hold num_st"),
        ("[" * 100000, ""),
    ):
        (folder / "cascade.json").write_text(content)
        _assert_says(folder, f"{folder}/cascade.json is damaged: {message}")
    (folder / "cascade.json").write_bytes(b"\xff\xfe")
    _assert_says(folder, f"{folder}/cascade.json is damaged: ")
    (folder / "cascade.json").write_text(text)
    whole = {k: (folder / f"student_{k}.onnx").read_bytes() for k in (1, 2, 3)}
    second = folder / "student_2.onnx"
    for content in (whole[2][:1000], whole[1], whole[3]):
        second.write_bytes(content)
        _assert_says(folder, f"{second} is damaged or of another cascade: its SHA-256 is not the one in cascade.json")
    document = json.loads(text)
    document["sha256"][1] = hashlib.sha256(b"").hexdigest()
    second.write_bytes(b"")
    (folder / "cascade.json").write_text(json.dumps(document))
    _assert_says(folder, f"{second} cannot be opened: ")
    second.write_bytes(whole[2])
    document = json.loads(text) | {"num_classes": 5, "weights": None}
    (folder / "cascade.json").write_text(json.dumps(document))
    _assert_says(
        folder, f"{folder}/student_1.onnx is of another cascade: it does not take images (1, 8, 9) to 5 classes"
    )
    (folder / "cascade.json").write_text(text)
    second.unlink()
    _assert_says(folder, f"{second} is missing: the cascade is of 3 students")


def _assert_says(folder: Path, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its message follows)
        OnnxCascade(folder)
    assert str(error.value).startswith(message) and "\n" not in str(error.value), error.value
