"""timm's readers in a config: wds/ and hfids/ as streams, hfds/ and folders by index."""

import io
import json
import logging
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.distillation.views import Stream
from timm_mamba_pkd.runner import train as training
from timm_mamba_pkd.runner.streams import ReadableStream, first_samples, open_stream, start_epoch

TO_TENSOR = transforms.ToTensor()


def shade(image: torch.Tensor) -> int:
    return round(float(image.mean()) * 51)


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), 5 * shade).save(file, "png")
    return file.getvalue()


def write_shards(root: Path, count: int, shards: int, broken: tuple[int, ...] = ()) -> Path:
    """`count` images of rising brightness and 3 classes as shard-0.tar, shard-1.tar, ..., and timm's info file."""
    root.mkdir()
    lengths = []
    for shard in range(shards):
        numbers = range(shard, count, shards)
        lengths.append(len(numbers))
        with tarfile.open(root / f"shard-{shard}.tar", "w") as archive:
            for number in numbers:
                for name, content in (
                    (f"{number:04d}.png", b"no image" if number in broken else png(number)),
                    (f"{number:04d}.cls", str(number % 3).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    split = {
        "name": "all",
        "num_samples": count,
        "filenames": [f"shard-{shard}.tar" for shard in range(shards)],
        "shard_lengths": lengths,
    }
    (root / "_info.json").write_text(json.dumps({"splits": {"all": split}}))
    return root


@pytest.fixture
def shards(tmp_path) -> dict[str, Path]:
    pytest.importorskip("webdataset", reason="pip install webdataset")
    return {
        "train": write_shards(tmp_path / "train", 24, 4),
        "val": write_shards(tmp_path / "val", 10, 2),
        "test": write_shards(tmp_path / "test", 13, 3),
    }


def wds(root: Path, training: bool = False) -> Any:
    return create_dataset("wds/", str(root), "all", is_training=training, input_img_mode="L", transform=TO_TENSOR)


@pytest.fixture
def streaming(build, shards) -> Any:
    """Make a config read its data from shards, and give the configs of its loaders."""

    def streaming(config: dict[str, Any], workers: int = 0) -> dict[str, Any]:
        to_tensor = build.call("torchvision.transforms.ToTensor")
        for name, root in shards.items():
            training = {"is_training": True} if name == "train" else {}
            config["datasets"][f"fake/{name}"] = build.call(
                "timm.data.create_dataset",
                name="wds/", root=str(root), split="all", input_img_mode="L", transform=to_tensor, **training,
            )  # fmt: skip
        section = config["train"] if "log_freq" in config["train"] else config["train"]["init"]["kwargs"]
        loaders = {
            "train": section["train_data_loader"],
            "val": section["val_data_loader"],
            "test": config["test"]["test_data_loader"],
        }
        for loader in loaders.values():
            del loader["sampler"]
            loader["kwargs"]["num_workers"] = workers
        return loaders

    return streaming


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_run(plain, run, streaming, caplog, workers):
    streaming(plain, workers)
    plain["train"] |= {"num_epochs": 2, "log_freq": 1}
    with caplog.at_level(logging.INFO):
        code, output = run(plain)
    assert code == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    steps = 3 if workers == 0 else 4  # timm fills up the batch of 8 of each worker, who has 12 samples
    assert f"step {steps}/{steps}" in caplog.text
    assert run(plain, command="evaluate")[0] == 0
    assert run(plain, command="check")[0] == 0


def test_a_progressive_run(progressive, run, streaming, tmp_path):
    streaming(progressive)
    progressive["train"]["init"]["kwargs"] |= {"rule": "residual", "num_epochs": 2}
    assert run(progressive, command="check")[0] == 0
    code, output = run(progressive)
    assert code == 0 and (output / "results.csv").is_file()
    assert run(progressive, output="again")[0] == 0
    path = Path("weights") / "ensemble.safetensors"
    assert (output / path).read_bytes() == (tmp_path / "again" / path).read_bytes()


def test_a_run_on_streams_is_exported_with_its_images(plain, run, streaming, capsys):
    streaming(plain)
    code, folder = run(plain)
    assert code == 0
    assert main(["export", str(folder), "--format", "hf"]) == 0
    assert "(test images)" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [2, 5])
def test_a_run_that_stops_goes_on(plain, run, streaming, assert_same_run, monkeypatch, workers, step):
    streaming(plain, workers)
    plain["train"]["num_epochs"] = 2
    assert run(plain, output="whole")[0] == 0
    steps = []

    def stop(self: Any, *args: Any) -> Any:
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGTERM)
        return train_step(self, *args)

    train_step = training.Trainer._step
    monkeypatch.setattr(training.Trainer, "_step", stop)
    code, folder = run(plain)
    assert code == 143
    assert run(plain)[0] == 0
    assert_same_run(folder.parent / "whole", folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cache_dir": "cache"},
            "cache_dir needs samples that have an index, but the training set is read as a stream",
        ),
        ({"rule": "bdistil"}, "rule BDistil needs samples that have an index"),
        (
            {"views": {"mixup_alpha": 0.2}},
            "views: data that are read as a stream have no index, which mixup_alpha needs",
        ),
        ({"views": {"num_views": 1}, "num_epochs": 2}, "views.num_views: 1 needs samples that have an index"),
    ],
)
def test_what_needs_an_index_is_refused(progressive, run, errors, streaming, change, message):
    streaming(progressive)
    progressive["train"]["init"]["kwargs"] |= change
    for command in ("check", "train"):
        code, output = run(progressive, command=command)
        assert code == 2 and not output.exists()
        (error,) = errors()
        assert error.startswith("line ") and message in error


def test_what_a_stream_cannot_be_read_with_is_refused(plain, build, run, errors, streaming, shards):
    loaders = streaming(plain)
    sampler = build.loader("fake/train")["sampler"]
    kwargs = {name: plain["datasets"][f"fake/{name}"]["init"]["kwargs"] for name in shards}
    for section, change, message in (
        (loaders["train"], {"sampler": sampler}, "which takes no sampler: remove it; its is_training: True shuffles"),
        (loaders["test"], {"sampler": sampler}, "test.test_data_loader: data set 'fake/test' is read as a stream"),
        (loaders["train"], {"batch_sampler": {"key": "x", "kwargs": {}}}, "which takes no batch_sampler: remove it"),
        (loaders["train"], {"dataset_wrapper": {"key": "CRDDatasetWrapper"}}, "which takes no dataset_wrapper"),
        (loaders["train"]["kwargs"], {"num_workers": 5}, "of 4 shards, too few for 5 workers (of all processes)"),
        (kwargs["val"], {"is_training": True}, "with is_training: True: an evaluation would be inexact"),
        (kwargs["test"], {"split": "shard-0.tar"}, "which does not tell its length: give its num_samples"),
        (kwargs["test"], {"split": "none"}, "split none not found in info"),
    ):
        before = dict(section)
        section |= change
        code, output = run(plain)
        assert code == 2 and not output.exists()
        (error,) = errors()
        assert error.startswith("line ") and message in error
        section.clear()
        section |= before


def test_data_with_an_index_need_a_sampler(plain, run, errors):
    del plain["train"]["train_data_loader"]["sampler"]
    assert run(plain)[0] == 2
    assert "train.stage1.train_data_loader has no 'sampler'" in errors()[0]


def test_an_evaluation_on_less_is_an_error(plain, run, errors, streaming, tmp_path, caplog):
    streaming(plain)
    root = write_shards(tmp_path / "broken", 13, 2, broken=(4,))
    plain["datasets"]["fake/test"]["init"]["kwargs"]["root"] = str(root)
    assert run(plain)[0] == 2
    assert errors()[0].startswith(
        "data set 'fake/test' gave 12 samples instead of 13: an evaluation leaves nothing out"
    )
    assert "UnidentifiedImageError" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_every_pass_reads_everything_once(shards, workers):
    """Also after the main process has had a look."""
    loader: dict[str, Any] = {"kwargs": {"num_workers": workers}}
    data = open_stream(wds(shards["test"]), "d", loader, ("test", "test_data_loader"), training=False)
    assert [shade(image) for image, _ in first_samples(data, 3)] == [0, 3, 6]
    batches = DataLoader(data, 4, num_workers=workers)
    for _ in range(2):
        images, labels = zip(
            *[(image, label) for pair in batches for image, label in zip(*pair, strict=True)], strict=True
        )
        assert sorted(map(shade, images)) == list(range(13))
        assert [int(label) for label in labels] == [shade(image) % 3 for image in images]


def order(data: IterableDataset, workers: int) -> list[int]:
    torch.manual_seed(0)
    return [shade(image) for images, *_ in DataLoader(data, 2, num_workers=workers) for image in images]


@pytest.mark.parametrize("workers", [0, 2])
def test_order_depends_on_the_epoch_alone(shards, workers):
    def stream() -> Any:
        loader: dict[str, Any] = {"kwargs": {"num_workers": workers, "batch_size": 2}}
        data = open_stream(wds(shards["train"], True), "d", loader, ("train", "train_data_loader"), training=True)
        return Stream(data)

    data = stream()
    orders = []
    for epoch in range(3):
        start_epoch(DataLoader(data), epoch)
        orders.append(order(data, workers))
        assert sorted(orders[-1]) == list(range(24))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    resumed = stream()
    start_epoch(DataLoader(resumed), 2)
    assert order(resumed, workers) == orders[2]


def test_ranks_share_a_training_and_not_an_evaluation(shards, monkeypatch):
    seen, evaluated = [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        training = ReadableStream(wds(shards["train"], True), "d", training=True)
        assert len(training) == 12
        seen += [shade(image) for image, _ in training]
        evaluation = ReadableStream(wds(shards["val"]), "val", training=False)
        assert len(evaluation) == 10
        evaluated.append([shade(image) for image, _ in evaluation])
    assert sorted(seen) == list(range(24))
    assert sorted(evaluated[0]) == sorted(evaluated[1]) == list(range(10))


@pytest.fixture
def arrow(tmp_path) -> Path:
    """24 images as a parquet file that `datasets` finds."""
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    root = tmp_path / "arrow"
    root.mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"]))
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(24)], "label": [i % 3 for i in range(24)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "train-00000-of-00001.parquet")
    return root


def arrow_data(build: Any, kind: str, root: Path, **kwargs: Any) -> Any:
    to_tensor = build.call("torchvision.transforms.ToTensor")
    common = {"root": str(root.parent / "cache"), "split": "train", "input_img_mode": "L", "transform": to_tensor}
    return build.call("timm.data.create_dataset", name=f"{kind}/{root}", **common, **kwargs)


def test_hfids(plain, build, run, arrow):
    plain["datasets"] = {
        "fake/train": arrow_data(build, "hfids", arrow, is_training=True, num_samples=24),
        "fake/val": arrow_data(build, "hfids", arrow, num_samples=24),
    }
    for loader in (plain["train"]["train_data_loader"], plain["train"]["val_data_loader"]):
        del loader["sampler"]
    plain["test"] = {"test_data_loader": {**plain["train"]["val_data_loader"]}}
    assert run(plain)[0] == 0
    assert run(plain, command="evaluate")[0] == 0


def test_hfds(progressive, build, run, capsys, arrow, tmp_path):
    """By index: with views and cached logits. It tells its classes."""
    for name in ("train", "val", "test"):
        progressive["datasets"][f"fake/{name}"] = arrow_data(build, "hfds", arrow)
    progressive["train"]["init"]["kwargs"]["cache_dir"] = str(tmp_path / "logits")
    assert run(progressive)[0] == 0
    for model in progressive["models"].values():
        model["kwargs"]["num_classes"] = 2
    assert run(progressive, output="second")[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after what `datasets` prints
    assert "the data has at least 3 classes, the models have 2: set num_classes" in error
