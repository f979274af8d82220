import argparse
import logging
import pickle
import warnings

import pytest
import safetensors.torch
import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from timm_mamba_pkd.models import WeightsError, load_weights, save_checkpoint, save_weights
from timm_mamba_pkd.models.weights import read_weights

SAVES = [(save_weights, "w.safetensors"), (save_checkpoint, "w.pt")]


class Tiny(nn.Module):
    """One of everything: views of one storage, an integer, a scalar, and a tensor that is not contiguous."""

    count: Tensor

    def __init__(self, seed: int = 0, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, classes)
        self.tied = self.body
        self.transposed = nn.Parameter(torch.randn(3, 5).t())
        self.register_buffer("count", torch.tensor(seed))


def assert_same(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("save", "name"), SAVES)
def test_round_trip(tmp_path, save, name):
    model, other = Tiny(1), Tiny(2)
    path = tmp_path / "new" / "folder" / name
    save(model, path)
    load_weights(other, path)
    assert_same(other, model)
    assert other.count == 1
    save(Tiny(3), str(path))
    load_weights(other, str(path))
    assert_same(other, Tiny(3))
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_files_are_plain(tmp_path):
    """Other tools read them."""
    model = Tiny(1)
    save_weights(model, tmp_path / "w.safetensors")
    save_checkpoint(model, tmp_path / "w.pt")
    for state in (
        safetensors.torch.load_file(tmp_path / "w.safetensors"),
        torch.load(tmp_path / "w.pt", weights_only=True)["model"],
    ):
        torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("when", ["fsync", "replace"])
@pytest.mark.parametrize(("save", "name"), SAVES)
def test_failing_write_leaves_the_old_file(tmp_path, monkeypatch, save, name, when):
    path = tmp_path / name
    save(Tiny(1), path)
    before = path.read_bytes()

    def fail(*args) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(f"os.{when}", fail)
    with pytest.raises(OSError, match="no space left"):
        save(Tiny(2), path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    save(Tiny(3), path)
    model = Tiny(4)
    load_weights(model, path)
    assert_same(model, Tiny(3))


@pytest.mark.parametrize("protocol", ["model", "state_dict", None])
def test_torch_formats(tmp_path, protocol):
    """torchdistill's checkpoints, timm's, and the bare state dict."""
    state = Tiny(1).state_dict()
    content = state
    if protocol is not None:
        optimizer = torch.optim.SGD(Tiny(1).parameters(), 0.1).state_dict()
        arguments = argparse.Namespace(config="config.yaml", seed=None, ratio=0.5, log=["a"])
        content = {"epoch": 3, "arch": "tiny", protocol: state, "optimizer": optimizer, "args": arguments}
    for legacy in (False, True):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
        model = Tiny(2)
        load_weights(model, tmp_path / "w.pth")
        assert_same(model, Tiny(1))


@pytest.mark.parametrize(
    ("order", "averaged"),
    [
        (["model", "state_dict", "model_ema", "state_dict_ema"], True),
        (["model", "state_dict", "model_ema"], True),
        (["model", "state_dict"], False),
    ],
)
def test_the_averaged_weights_come_first(tmp_path, caplog, order, averaged):
    """As in timm, whose `create_model(checkpoint_path=)` reads the same file."""
    path = tmp_path / "w.pth.tar"
    content = {key: {"weight": torch.full((1, 1), float(i))} for i, key in enumerate(order)}
    torch.save({"state_dict_ema": None, **content}, path)
    assert read_weights(path) == load_state_dict(str(path)) == {"weight": torch.tensor([[len(order) - 1.0]])}
    records = [record for record in caplog.records if record.name.startswith("timm_mamba_pkd")]
    assert [record.levelno for record in records] == averaged * [logging.WARNING]
    assert not averaged or records[0].message == f"The weights taken from {path} are the averaged ones ({order[-1]})"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapped_models(tmp_path, prefix):
    state = {prefix + name: tensor for name, tensor in Tiny(1).state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    safetensors.torch.save_file(
        {name: tensor.clone().contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors"
    )
    for name in ("w.pt", "w.safetensors"):
        model = Tiny(2)
        load_weights(model, tmp_path / name)
        assert_same(model, Tiny(1))


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_weights(Tiny(1), tmp_path / "w.safetensors")
    assert read_weights("~/w.safetensors")["count"] == 1


def assert_refused(path, message: str) -> None:
    model = Tiny(7)
    with pytest.raises(WeightsError, match=message) as error:
        load_weights(model, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert_same(model, Tiny(7))


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize(("save", "name"), SAVES)
def test_truncated_file(tmp_path, save, name, keep):
    path = tmp_path / name
    save(Tiny(1), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert_refused(path, "cannot be read: .|is not a plain state dict")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_not_a_weights_file(tmp_path, name):
    (tmp_path / name).write_text("<html>404: not found</html>")
    assert_refused(tmp_path / name, "cannot be read: .|is not a plain state dict")


def test_missing_file_and_folder(tmp_path):
    assert_refused(tmp_path / "w.pt", "does not exist")
    assert_refused(tmp_path, "is a directory")


class Malicious:
    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return (self.target.mkdir, ())


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_malicious_pickle_is_not_executed(tmp_path, kind):
    path, target = tmp_path / "w.pt", tmp_path / "owned"
    content = {"model": Tiny(1).state_dict(), "args": Malicious(target)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    assert_refused(path, "is not a plain state dict and was not loaded")
    assert not target.exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert target.exists(), "the attack is real"


def test_torchscript_is_refused_without_advice(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "w.pt")
        assert_refused(tmp_path / "w.pt", "is not a plain state dict and was not loaded$")


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.zeros(3), {"weight": 1.0}, {0: torch.zeros(1)}, {"model": {"weight": "none"}}, {"epoch": 3}],
)
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", "holds no state dict")


def test_whole_model_is_refused(tmp_path):
    torch.save(Tiny(1), tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", "is not a plain state dict")


def test_weights_of_another_class_count(tmp_path):
    save_weights(Tiny(1, classes=5), tmp_path / "w.safetensors")
    assert_refused(
        tmp_path / "w.safetensors",
        r"is of another model than Tiny: "
        r"shape of head.weight \(5, 4\) instead of \(3, 4\), head.bias \(5,\) instead of \(3,\)$",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    model = Tiny(1)
    model.head.bias.data[1] = value
    save_weights(model, tmp_path / "w.safetensors")
    assert_refused(tmp_path / "w.safetensors", r"holds values that are not finite: head.bias$")


def test_weights_of_integers(tmp_path):
    torch.save({**Tiny(1).state_dict(), "head.bias": torch.ones(3, dtype=torch.int64)}, tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", "another model than Tiny: dtype of head.bias torch.int64 instead of torch.float")


def test_weights_of_another_student(tmp_path):
    students = [timm.create_model(f"mamba_pkd_s{i}", num_classes=10) for i in (1, 2)]
    save_weights(students[0], tmp_path / "w.safetensors")
    before = {name: tensor.clone() for name, tensor in students[1].state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(students[1], tmp_path / "w.safetensors")
    message = str(error.value)
    assert "of another model than MambaPKD: missing stages.0.blocks.0.expand.conv.weight, " in message
    assert "; shape of stages.0.downsample.project.conv.weight (12, 16, 1, 1) instead of (16, 16, 1, 1), " in message
    assert message.count(", ...") == 2
    torch.testing.assert_close(dict(students[1].state_dict()), before, rtol=0, atol=0)


def test_missing_and_unexpected_names(tmp_path):
    state = Tiny(1).state_dict()
    del state["head.bias"]
    state["neck.bias"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", "another model than Tiny: missing head.bias; unexpected neck.bias$")
