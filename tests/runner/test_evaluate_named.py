"""``mamba-pkd evaluate --model``: strangers' checkpoints on folders of images."""

import argparse
import contextlib
import io
import pickle
import re
import shutil
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.models import count_macs, save_weights
from timm_mamba_pkd.report import count_params, read_metrics


class Evil:
    """Leaves a marker when it is unpickled by the book."""

    def __reduce__(self) -> Any:
        return open, ("marker", "w")


class Builder:
    """Its state is set by a call."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"x": Evil()}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with images of three classes under data/val, 8x8 and larger, grey and in colour."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for label in range(3):
        folder = tmp_path / "data" / "val" / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (8 + i, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert("RGB" if i % 2 else "L").save(folder / f"{i}.png")
    return tmp_path


def model(name: str = "mamba_pkd_s1", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 3, **kwargs}).eval()


def evaluate(*flags: str) -> int:
    return main(["evaluate", "--data-root", "data", "-j", "0", "--device", "cpu", *flags])


def by_hand(model: nn.Module, folder: Path, channels: int) -> float:
    """Top-1 as timm's documentation computes it, one image at a time."""
    config = resolve_data_config({}, model=model, use_test_size=True)
    mean, std = ([sum(config[name]) / 3] * channels if channels == 1 else config[name] for name in ("mean", "std"))
    size = (channels, *config["input_size"][1:])
    transform: Any = create_transform(**{**config, "mean": mean, "std": std, "input_size": size})
    paths = sorted(folder.rglob("*.png"))
    with torch.inference_mode():
        hits = [
            int(model(transform(Image.open(path).convert("RGB" if channels == 3 else "L"))[None]).argmax())
            == int(path.parent.name[-1])
            for path in paths
        ]
    return 100 * sum(hits) / len(hits)


@pytest.mark.parametrize("name", ["mamba_pkd_s1", "test_resnet", "test_vit"])
@pytest.mark.parametrize("channels", [3, 1])
def test_accuracy(name, channels, place, capsys):
    subject = model(name, in_chans=channels)
    save_weights(subject, "weights.safetensors")
    assert evaluate("--model", name, "--checkpoint", "weights.safetensors", "-b", "5") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{name}: Acc@1 {by_hand(subject, place, channels):.2f}  on 12 images of 3 classes"
    macs = count_macs(subject, (channels, *subject.pretrained_cfg["input_size"][1:]))
    assert second.startswith(f"{count_params(subject) / 1e6:.3g} M parameters, {macs / 1e6:.3g} MMACs; {channels}x")


def test_ensemble_with_its_students_named(place, capsys):
    subject = model("mamba_pkd_ensemble", students=["mamba_pkd_s1", "mamba_pkd_s2"], img_size=8, num_classes=7)
    torch.save({"state_dict": subject.state_dict()}, "ensemble.pt")
    students = "students=['mamba_pkd_s1','mamba_pkd_s2']"
    flags = [
        "--model",
        "mamba_pkd_ensemble",
        "--model-kwargs",
        students,
        "--img-size",
        "8",
        "--mean",
        "0",
        "--std",
        "1",
    ]
    assert evaluate(*flags, "--checkpoint", "ensemble.pt") == 0
    out = capsys.readouterr().out
    assert re.match(r"mamba_pkd_ensemble: Acc@1 \d+\.\d\d  Acc@5 \d+\.\d\d  on 12 images of 3 classes\n", out)
    assert "3x8x8" in out and "mean 0, std 1" in out


def test_torchvisions_classes(place, capsys):
    save_weights(model(), "weights.safetensors")
    flags = ("--model", "mamba_pkd_s1", "--checkpoint", "weights.safetensors")
    assert evaluate(*flags) == evaluate(*flags, "--dataset", "torch/image_folder") == 0
    first, _, third, _ = capsys.readouterr().out.splitlines()
    assert first == third


def test_a_split_that_is_not_there_is_everything_and_said_to_be(place, capsys, caplog):
    save_weights(model(), "weights.safetensors")
    flags = ("--model", "mamba_pkd_s1", "--checkpoint", "weights.safetensors")
    (place / "data" / "val").rename(place / "data" / "test")
    (place / "data" / "train" / "class0").mkdir(parents=True)
    shutil.copy(place / "data" / "test" / "class0" / "0.png", place / "data" / "train" / "class0")
    assert evaluate(*flags) == evaluate(*flags, "--split", "tset") == evaluate(*flags, "--split", "test") == 0
    counts = re.findall(r"on (\d+) images", capsys.readouterr().out)
    assert counts == ["13", "13", "12"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [re.findall(r"has no folder of the split (.*?),", text) for text in warnings] == [["validation"], ["tset"]]
    (place / "data" / "test").rename(place / "data" / "valid")  # timm's other names of it
    caplog.clear()
    assert evaluate(*flags) == evaluate(*flags, "--split", "train") == 0 and not caplog.records
    assert evaluate(*flags, "--split", "x" * 300) == 0 and len(caplog.records) == 1


@pytest.mark.fault
@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_broken_images_are_named_and_there_is_no_result(dataset, workers, place, capsys):
    save_weights(model(), "weights.safetensors")
    folder = place / "data" / "val"
    (folder / "class0" / "text.png").write_text("no image")
    whole = (folder / "class1" / "3.png").read_bytes()
    (folder / "class1" / "cut.png").write_bytes(whole[:-60])
    (folder / "class2" / "empty.jpg").write_bytes(b"")
    flags = ("--model", "mamba_pkd_s1", "--checkpoint", "weights.safetensors", "--dataset", dataset, "-j", workers)
    assert evaluate(*flags) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "3 of 15 images cannot be read" in captured.err
    assert all(f"{name} (" in captured.err for name in ("class0/text.png", "class1/cut.png", "class2/empty.jpg"))


@pytest.mark.fault
def test_only_broken_images(place, capsys):
    save_weights(model(), "weights.safetensors")
    for path in place.rglob("*.png"):
        path.write_bytes(b"")
    assert evaluate("--model", "mamba_pkd_s1", "--checkpoint", "weights.safetensors") == 2
    error = capsys.readouterr().err
    assert "12 of 12 images cannot be read" in error and error.endswith("; ...\n")


def test_an_image_that_can_be_read_when_it_is_tried_again(place, capsys, monkeypatch):
    save_weights(model(), "weights.safetensors")
    convert, calls = Image.Image.convert, []

    def once_broken(image: Image.Image, *args: Any) -> Image.Image:
        calls.append(args)
        if len(calls) == 3:
            raise OSError("the disk was busy")
        return convert(image, *args)

    monkeypatch.setattr(Image.Image, "convert", once_broken)
    assert evaluate("--model", "mamba_pkd_s1", "--checkpoint", "weights.safetensors") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "class0/2.png of data set 'data' cannot be read (the disk was busy)" in captured.err


WRONG = {
    "--model mamba_pkd_s9 --checkpoint w.pt": "unknown model 'mamba_pkd_s9'",
    "--model mamba_pkd_s1": "mamba_pkd_s1 has no weights: name a file by --checkpoint",
    "--model mamba_pkd_s1.mnist --num-classes 3": "mamba_pkd_s1.mnist brings its weights: leave --checkpoint, --num-",
    "--model mamba_pkd_s1.nist": "mamba_pkd_s1.nist has no weights: name a file by --checkpoint",
    "--model mamba_pkd_s1 --checkpoint gone.pt": "weights file gone.pt does not exist",
    "--model mamba_pkd_s1 --checkpoint data": "weights file data is a directory",
    "--model mamba_pkd_s2 --checkpoint w.safetensors": "is of another model than MambaPKD",
    "--model mamba_pkd_s1 --checkpoint w.safetensors --num-classes 4": "is of another model than MambaPKD",
    "--model mamba_pkd_s1 --checkpoint w.safetensors --data-root gone": "--data-root gone is not there",
    "--model mamba_pkd_s1 --checkpoint w.safetensors --data-root w.safetensors": "is a file: name a folder",
    "--model mamba_pkd_s1 --checkpoint w.safetensors --data-root empty": "Found 0 images",
    "--model mamba_pkd_s1 --checkpoint w.safetensors --dataset hfds/evil": "--dataset hfds/evil is not supported",
    "--model mamba_pkd_s1 --checkpoint w.safetensors --dataset torch/cifar10": "Dataset not found",
    "--model mamba_pkd_s1 --checkpoint w.safetensors --mean 1 2": "--mean must be one number, or 3",
    "--model mamba_pkd_s1 --checkpoint two.safetensors": "data has 3 classes, mamba_pkd_s1 2",
    "--model mamba_pkd_s1 --checkpoint six.safetensors": "takes images of 6 channels",
    "--model mamba_pkd_s1 --checkpoint w.safetensors --output x": "--output is for evaluate --config",
    "--config c.yaml --num-classes 3": "--num-classes is for evaluate --model",
    "--config c.yaml --interpolation bicubic": "--interpolation is for evaluate --model",
    "--config c.yaml --model-kwargs a=1": "--model-kwargs is for evaluate --model",
    "--model mamba_pkd_s1 --checkpoint w.safetensors --model-kwargs num_classes=3": "--model-kwargs num_classes has a "
    "flag of its own: --num-classes",
}


@pytest.mark.parametrize("flags", WRONG)
def test_errors(flags, place, capsys):
    (place / "empty").mkdir()
    save_weights(model(), "w.safetensors")
    save_weights(model(num_classes=2), "two.safetensors")
    save_weights(model(in_chans=6), "six.safetensors")
    own = [] if "--config" in flags else ["--data-root", "data"]
    assert main(["evaluate", *own, "-j", "0", "--device", "cpu", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mamba-pkd: error: ") and WRONG[flags] in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--config", "x", "--model", "y"]])
def test_a_config_or_a_model(flags):
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", *flags])
    assert exit.value.code == 2


def state() -> dict[str, Tensor]:
    return model().state_dict()


def legacy_tar(path: Path) -> None:
    """The format of PyTorch before 0.1.2: a tar archive of pickles."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Evil())
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def lying_header(path: Path) -> None:
    save_file(state(), path)
    data = bytearray(path.read_bytes())
    data[:8] = struct.pack("<Q", 1 << 60)
    path.write_bytes(data)


def lying_offsets(path: Path) -> None:
    header = b'{"head.fc.weight":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


def traversal(path: Path) -> None:
    """A zip archive of torch.save's kind that names files outside of it."""
    torch.save(state(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../marker", "x")


def evil_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
        archive.writestr("archive/version", "3")


def script(path: Path) -> None:
    torch.jit.script(nn.Linear(1, 1)).save(path)


def module_source(path: Path) -> None:
    path.write_text("open('marker', 'w')\n")


def raw_pickle(content: Any) -> Callable[[Path], Any]:
    return lambda path: Path(path).write_bytes(pickle.dumps(content))


def saved(content: Any) -> Callable[[Path], Any]:
    return lambda path: torch.save(content() if callable(content) else content, path)


class _Global(dict):
    """A state dict of a class of the test's own."""


CHECKPOINTS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a pickle": ("x.pt", raw_pickle(Evil())),
    "torch.save": ("x.pt", saved(Evil())),
    "old torch.save": ("x.pth", lambda path: torch.save(Evil(), path, _use_new_zipfile_serialization=False)),
    "among tensors": ("x.pt", saved(lambda: {**state(), "head.fc.bias": Evil()})),
    "beside the state dict": ("x.pt", saved(lambda: {"state_dict": state(), "args": Evil()})),
    "nested": ("x.pt", saved(lambda: {"model": {"a": [{"b": (1, Evil())}]}})),
    "by state": ("x.pt", saved(Builder())),
    "as key": ("x.pt", raw_pickle({Evil(): 1})),
    "a class of the file's own": ("x.pt", saved(lambda: _Global(state()))),
    "a whole model": ("x.pt", saved(model)),
    "os.system": ("x.pt", lambda path: path.write_bytes(b"cposix\nsystem\n(S'touch marker'\ntR.")),
    "named safetensors": ("x.safetensors", saved(Evil())),
    "safetensors named pt": ("x.pt", lambda path: save_file(state(), path)),
    "legacy tar": ("x.pth.tar", legacy_tar),
    "zip": ("x.pt", evil_zip),
    "paths in a zip": ("x.pt", traversal),
    "header longer than the file": ("x.safetensors", lying_header),
    "more data than there is": ("x.safetensors", lying_offsets),
    "TorchScript": ("x.pt", script),
    "Python": ("x.pt", module_source),
    "NumPy": ("x.npy", lambda path: np.save(path, np.array([Evil()], dtype=object), allow_pickle=True)),
    "empty": ("x.pt", lambda path: path.write_bytes(b"")),
    "a list": ("x.pt", saved([1, 2])),
    "numbers": ("x.pt", saved({"a": 1})),
    "sparse": ("x.pt", saved(lambda: {**state(), "head.fc.bias": torch.zeros(3).to_sparse()})),
    "on meta": ("x.pt", saved(lambda: {name: tensor.to("meta") for name, tensor in state().items()})),
    "complex": ("x.pt", saved(lambda: {**state(), "head.fc.bias": torch.zeros(3, dtype=torch.complex64)})),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hostile_checkpoint(name, place, capsys):
    file, write = CHECKPOINTS[name]
    write(place / file)
    before = sorted(place.parent.glob("*"))
    assert evaluate("--model", "mamba_pkd_s1", "--checkpoint", file) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"mamba-pkd: error: weights file {file} ") and captured.err.count("\n") == 1
    assert captured.out == "" and not (place / "marker").exists() and sorted(place.parent.glob("*")) == before


@pytest.mark.fault
@pytest.mark.parametrize("name", ["a pickle", "torch.save", "old torch.save", "nested", "by state"])
def test_the_pickles_are_hostile(name, place):
    """They are if they are read as pickles were before."""
    file, write = CHECKPOINTS[name]
    write(place / file)
    with contextlib.suppress(pickle.UnpicklingError, EOFError, RuntimeError):
        torch.load(place / file, weights_only=False)
    assert (place / "marker").exists()


@pytest.mark.fault
@pytest.mark.parametrize("where", ["models", "stage", "timm", "wrapper"])
def test_checkpoints_that_a_config_names(where, place, progressive, run, capsys):
    """Also where torchdistill would unpickle them, and without --safe-config."""
    torch.save({"model": Evil()}, "x.pt")
    teacher = progressive["models"]["teacher_model"]
    if where == "models":
        teacher["src_ckpt"] = "x.pt"
    elif where == "timm":
        teacher["kwargs"]["checkpoint_path"] = "x.pt"
    elif where == "stage":
        progressive["train"]["init"]["kwargs"]["teacher"] = {"src_ckpt": "x.pt"}
    else:
        kwargs = {"minimal": None, "input_module_path": "fc", "uses_decoder": True, "paraphraser_ckpt": "x.pt"}
        sizes = {"k": 0.5, "num_input_channels": 3}
        wrapper = {"key": "Teacher4FactorTransfer", "kwargs": {**kwargs, "paraphraser_kwargs": sizes}}
        progressive["train"]["init"]["kwargs"]["teacher"] = {"auxiliary_model_wrapper": wrapper}
    assert run(progressive)[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mamba-pkd: error: ") and not (place / "marker").exists()
    assert "was not loaded" in error and "weights_only" not in error


def test_stage_weights_are_loaded(place, progressive, run, build):
    """A stage's src_ckpt, also of torchdistill's own format with its Namespace, and as safetensors."""
    kwargs = {"model_name": "test_resnet", "num_classes": 3, "in_chans": 1}
    teacher = timm.create_model(**kwargs)
    content = {"model": teacher.state_dict(), "args": argparse.Namespace(x=1), "best_value": 1.0}
    torch.save(content, "x.pt")
    save_weights(teacher, "x.safetensors")
    losses = []
    for number, source in enumerate(["x.pt", "x.safetensors", None]):
        progressive["models"]["teacher_model"]["src_ckpt"] = None if source else "x.pt"
        progressive["train"]["init"]["kwargs"]["teacher"] = {"src_ckpt": source} if source else {}
        code, folder = run(progressive, output=f"run{number}")
        assert code == 0
        losses.append([record["loss"] for record in read_metrics(folder / "metrics.jsonl")])
    assert losses[0] == losses[1] == losses[2]
