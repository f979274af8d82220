"""Images that cannot be read, in folders, tar files and Arrow files: in training replaced and named, else an error."""

import logging
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchdistill.datasets.wrapper import BaseDatasetWrapper
from torchvision import transforms
from torchvision.datasets import ImageFolder

from timm_mamba_pkd.distillation.views import Views
from timm_mamba_pkd.runner.unreadable import Readable, UnreadableError, file_of

pytestmark = pytest.mark.fault

PER_CLASS = 8
TO_TENSOR = transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])


@pytest.fixture
def folder(tmp_path) -> Path:
    """24 images of 3 classes, 0/0.jpg to 2/7.jpg, each of rising brightness, in the order of their names."""
    root = tmp_path / "images"
    for label in range(3):
        (root / str(label)).mkdir(parents=True)
        for number in range(PER_CLASS):
            shade = 10 * (PER_CLASS * label + number)
            Image.new("L", (8, 8), shade).save(root / str(label) / f"{number}.jpg")
    return root


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "gone")


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncated, "runcated"),
    "empty": (lambda path: path.write_bytes(b""), "cannot identify image file"),
    "text": (lambda path: path.write_text("no image\n" * 100), "cannot identify image file"),
    "gone": (Path.unlink, "No such file"),
    "link to nowhere": (dangling, "No such file"),
}
KINDS: dict[str, Callable[[Path], Any]] = {
    "torchvision": lambda root: ImageFolder(root, TO_TENSOR),
    "timm": lambda root: create_dataset("", str(root), transform=TO_TENSOR),
}


@pytest.fixture(params=KINDS)
def kind(request) -> Callable[[Path], Any]:
    return KINDS[request.param]


def shades(loader: DataLoader) -> list[int]:
    """What each image of a loader is, by its brightness."""
    batches: Any = iter(loader)
    try:
        return [round(float(image.mean()) * 25.5) for images, *_ in batches for image in images]
    finally:
        if loader.num_workers:  # after an error PyTorch waits 5 s for each worker if it is left to garbage collection
            batches._shutdown_workers()


class LittleMemory(Dataset):
    """Its sample 3 is broken, and its sample 4 does not fit into memory."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index in (3, 4):
            raise OSError if index == 3 else MemoryError
        return index


@pytest.mark.parametrize("index", [3, 4])
def test_memory_that_runs_out_is_no_unreadable_image(index):
    """Neither at an image nor at the one that takes its place."""
    data = Readable(LittleMemory(), "d", training=True)
    with pytest.raises(MemoryError):
        data[index]
    assert data.unreadable == [3] * (index == 3)


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_training_replaces_and_names(kind, folder, caplog, breakage):
    data = Readable(kind(folder), "d", training=True)
    change, reason = BREAKAGES[breakage]
    change(folder / "1" / "2.jpg")
    assert shades(DataLoader(data, 8)) == [*range(10), 11, *range(11, 24)]
    assert data[10][1] == 1
    data.report()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(folder / "1" / "2.jpg") in record.message and reason in record.message
    assert "1 of 24 in data set 'd' so far, the run ends above 10" in record.message
    assert shades(DataLoader(data, 8))[10] == 11
    data.report()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_an_error_that_names_the_file(kind, folder, breakage, workers):
    data = Readable(kind(folder), "val", training=False)
    change, reason = BREAKAGES[breakage]
    change(folder / "1" / "2.jpg")
    with pytest.raises(UnreadableError) as error:
        shades(DataLoader(data, 8, num_workers=workers))
    message = str(error.value)
    assert message.startswith(f"{folder / '1' / '2.jpg'} of data set 'val' cannot be read (")
    assert reason in message and message.endswith("): an evaluation leaves nothing out")
    assert "\n" not in message


@pytest.mark.parametrize(("name", "method"), [("torchvision", "fork"), ("timm", "fork"), ("timm", "spawn")])
def test_workers_report_to_the_main_process(folder, caplog, name, method):
    data = Readable(KINDS[name](folder), "d", training=True)
    for name in ("0/0.jpg", "0/7.jpg", "1/0.jpg", "2/7.jpg"):  # a neighbour in the next class, the last one
        (folder / name).write_bytes(b"")
    loader = DataLoader(data, 4, num_workers=2, multiprocessing_context=method)
    expected = [1, *range(1, 7), 9, 9, *range(9, 23), 1]
    assert shades(loader) == expected
    data.report()
    assert [record.message.split(" cannot")[0] for record in caplog.records] == [
        str(folder / name) for name in ("0/0.jpg", "0/7.jpg", "1/0.jpg", "2/7.jpg")
    ]
    assert "4 of 24" in caplog.records[-1].message
    assert shades(DataLoader(data, 4)) == expected  # whatever the number of workers


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many(kind, folder, caplog, workers):
    data = Readable(kind(folder), "d", training=True)
    paths = sorted(folder.glob("*/*.jpg"))
    for path in paths[:10]:
        path.write_bytes(b"")
    assert len(shades(DataLoader(data, 8, num_workers=workers))) == 24
    paths[20].write_bytes(b"")
    with pytest.raises(UnreadableError) as error:
        shades(DataLoader(data, 8, num_workers=workers))
    named, _, reason = str(error.value).partition(" of data set 'd' cannot be read (")
    assert Path(named) == paths[20] or workers  # which of them the workers meet at last is their luck
    assert named in map(str, paths) and reason.startswith("cannot identify image file")
    assert str(error.value).endswith("), which makes 11 of 24: repair them, or take them out of the data set")
    data.report()
    assert len(caplog.records) == 11


def test_limit_is_a_thousandth_at_least_ten_and_never_all():
    class Nothing(Dataset):
        def __init__(self, length: int) -> None:
            self.length = length

        def __len__(self) -> int:
            return self.length

        def __getitem__(self, index: int) -> Any:
            raise ValueError("nothing here")

    limits = {length: Readable(Nothing(length), "d", training=True).limit for length in (1, 3, 100, 9_999, 1_281_167)}
    assert limits == {1: 0, 3: 2, 100: 10, 9_999: 10, 1_281_167: 1281}
    for length in limits:
        with pytest.raises(UnreadableError, match=rf"\(nothing here\), which makes {limits[length] + 1} of {length}"):
            Readable(Nothing(length), "d", training=True)[0]
    data = Readable(Nothing(3), "d", training=True)
    with pytest.raises(ValueError, match="nothing here"):  # an index of nobody's is no sample to replace
        data[3]


def test_random_numbers_stay_as_they_are(kind, folder):
    (folder / "0" / "3.jpg").write_bytes(b"")
    data = Readable(kind(folder), "d", training=True)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # pyright: ignore
    data[3]
    data.report()
    (folder / "0" / "4.jpg").write_bytes(b"")
    data[3]
    Image.new("L", (8, 8)).save(folder / "0" / "4.jpg")
    data.dataset.transform = transforms.Compose([TO_TENSOR, transforms.RandomErasing(1.0)])
    data.report()  # the image that was unreadable is read again, for the reason
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # pyright: ignore


def test_views_replay(kind, folder):
    """The view of an unreadable sample is made of the next one's image by the sample's own random numbers."""
    data = kind(folder)
    data.transform = transforms.Compose([TO_TENSOR, transforms.RandomErasing(1.0, scale=(0.2, 0.5))])
    truncated(folder / "0" / "3.jpg")

    def views() -> Views:
        return Views(Readable(data, "d", training=True), num_views=2, mixup_alpha=0.4, num_classes=3)

    first, again = views(), views()
    order = torch.randperm(24).tolist()
    shuffled = {i: again.get(i, 1) for i in order}
    for i in range(24):
        image, target, supp_dict = first.get(i, 1)
        assert torch.equal(image, shuffled[i][0]) and torch.equal(target, shuffled[i][1])
        assert supp_dict == shuffled[i][2] and supp_dict["index"] == i
    assert not torch.equal(first.get(3, 1)[0], first.get(4, 1)[0])


class Tensors(Dataset):
    """A map-style data set of anybody's, whose sample 1 raises what it is given."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 1:
            raise self.error
        return torch.full((1, 8, 8), index / 25.5), 0


def test_any_data_set(caplog):
    for error in (
        RuntimeError("jpeg"),
        SyntaxError("broken PNG file"),
        EOFError(),
        Image.DecompressionBombError("big"),
    ):
        data = Readable(Tensors(error), "d", training=True)
        assert shades(DataLoader(data, 3)) == [0, 2, 2]
        data.report()
        assert f"sample 1 cannot be read ({type(error).__name__}: {error})" in caplog.records[-1].message
    with pytest.raises(MemoryError):
        Readable(Tensors(MemoryError()), "d", training=True)[1]


def test_files_in_parts_of_data_sets(folder, tmp_path):
    data = ImageFolder(folder)
    both = ConcatDataset([Subset(data, [5, 6]), create_dataset("", str(folder))])
    names = [Path(file_of(both, i)).relative_to(folder).as_posix() for i in (0, 1, 2, 25)]
    assert names == ["0/5.jpg", "0/6.jpg", "0/0.jpg", "2/7.jpg"]
    assert file_of(BaseDatasetWrapper(data), 3) == "sample 3"
    (folder / "0" / "0.jpg").write_bytes(b"")
    with pytest.raises(UnreadableError, match=r"0\.jpg"):  # timm's within another data set does not replace it itself
        Readable(both, "val", training=False)[2]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_timm_tar_files(folder, tmp_path, method):
    """Workers read a tar file that the main process has read from before."""
    (folder / "0" / "3.jpg").write_bytes(b"")
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname="images")
    data = Readable(create_dataset("", str(path), transform=TO_TENSOR), "d", training=True)
    assert shades(DataLoader(data, 24)) == [0, 1, 2, 4, *range(4, 24)]
    loader = DataLoader(data, 2, num_workers=2, multiprocessing_context=method)
    assert shades(loader) == [0, 1, 2, 4, *range(4, 24)]


def test_timm_arrow_data(folder, caplog):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    images = [path.read_bytes() for path in sorted(folder.glob("*/*.jpg"))]
    images[3] = b"no image"
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"]))
    rows = {"image": [{"bytes": image, "path": None} for image in images], "label": [i // 8 for i in range(24)]}
    (folder / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    for path in folder.glob("?"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    data = create_dataset(f"hfds/{folder}", str(folder.parent / "cache"), "train", transform=TO_TENSOR)
    with pytest.raises(
        UnreadableError, match=r"sample 3 of data set 'val' cannot be read \(cannot identify image file"
    ):
        shades(DataLoader(Readable(data, "val", training=False), 8))
    training = Readable(data, "d", training=True)
    assert shades(DataLoader(training, 8)) == [0, 1, 2, *range(4, 5), *range(4, 24)]


def image_folders(build: Any, folder: Path) -> Any:
    to_tensor = build.call("torchvision.transforms.ToTensor")
    return build.call("timm.data.create_dataset", name="", root=str(folder), input_img_mode="L", transform=to_tensor)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_names_and_counts_them(progressive, build, run, folder, tmp_path, caplog, workers):
    """Views, cached logits, two stages: the folder's broken images are in the log, once each; the cache is used."""
    progressive["datasets"]["fake/train"] = image_folders(build, folder)
    arguments = progressive["train"]["init"]["kwargs"]
    arguments |= {"num_epochs": 2, "cache_dir": str(tmp_path / "cache")}
    arguments["train_data_loader"]["kwargs"]["num_workers"] = workers
    (folder / "0" / "0.jpg").write_bytes(b"")  # the first, which is looked at before training
    truncated(folder / "1" / "2.jpg")
    assert run(progressive, command="check")[0] == 0
    assert str(folder / "0" / "0.jpg") in caplog.text
    with caplog.at_level(logging.INFO):
        code, output = run(progressive)
    assert code == 0
    log = (output / "log.txt").read_text().splitlines()
    named = [line for line in log if "cannot be read" in line]
    assert len(named) == 2
    assert any(str(folder / "0" / "0.jpg") in line for line in named)
    assert "2 of 24 in data set 'fake/train'" in named[1]
    assert not any("Skipped sample" in line for line in log)  # timm's
    (cached,) = [line for line in log if "Stage 2  logits of teacher" in line]
    assert "0 computed, 48 cached" in cached

    rerun, _ = run(progressive, output="again")
    assert rerun == 0
    for name in ("ensemble", "1_mamba_pkd_s1"):
        path = Path("weights") / f"{name}.safetensors"
        assert (output / path).read_bytes() == (tmp_path / "again" / path).read_bytes()


def test_a_run_ends_above_the_limit(plain, build, run, errors, folder, caplog):
    plain["datasets"]["fake/train"] = image_folders(build, folder)
    for path in sorted(folder.glob("*/*.jpg"))[12:]:
        path.write_bytes(b"")
    assert run(plain)[0] == 2
    (error,) = errors()
    assert "which makes 11 of 24: repair them" in error


@pytest.mark.parametrize("which", ["val", "test"])
def test_a_run_does_not_evaluate_on_less(plain, build, run, errors, folder, which):
    plain["datasets"][f"fake/{which}"] = image_folders(build, folder)
    (folder / "1" / "2.jpg").write_bytes(b"")
    assert run(plain)[0] == 2
    (error,) = errors()
    assert error.startswith(f"{folder / '1' / '2.jpg'} of data set 'fake/{which}' cannot be read")


def test_data_that_is_both_trained_and_evaluated_on(plain, build, run, errors, folder):
    plain["datasets"]["fake/train"] = plain["datasets"]["fake/val"] = image_folders(build, folder)
    plain["train"]["val_data_loader"] = build.loader("fake/train")
    (folder / "1" / "2.jpg").write_bytes(b"")
    assert run(plain)[0] == 2
    assert "an evaluation leaves nothing out" in errors()[0]


@pytest.mark.parametrize("place", ["train", "test"])
def test_drop_last_of_an_evaluation(plain, run, errors, place):
    section = plain["train"]["val_data_loader"] if place == "train" else plain["test"]["test_data_loader"]
    section["kwargs"]["drop_last"] = True
    assert run(plain)[0] == 2
    assert "drop_last would leave samples out of the evaluation: remove it" in errors()[0]
