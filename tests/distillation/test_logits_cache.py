"""Cached logits are the computed ones, rounded to float16, whatever happened to the folder."""

import json
import multiprocessing
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from timm_mamba_pkd.distillation import CacheError
from timm_mamba_pkd.distillation.logits_cache import CachedModel, LogitsCache, cache_bytes
from timm_mamba_pkd.distillation.views import Views

SAMPLES, CLASSES, VIEWS = 23, 4, 2


class Data(Dataset):
    """Images with noise of the strength ``noise`` as augmentation."""

    def __init__(self, noise: float = 0.1) -> None:
        self.images = torch.randn(SAMPLES, 1, 3, 3, generator=torch.Generator().manual_seed(5))
        self.noise = noise

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] + self.noise * torch.randn(1, 3, 3), index % CLASSES


class Model(nn.Module):
    """A small classifier that counts the images it sees."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
        self.scale = scale
        self.seen = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.scale * self.body(x)


def views_of(data: Data | None = None, **kwargs: Any) -> Views:
    return Views(data or Data(), **{"num_views": VIEWS, **kwargs})


def open_cache(root: Path, model: nn.Module, views: Views, precision: str = "float32") -> LogitsCache:
    return LogitsCache(root, model, views, CLASSES, precision, "teacher")


def epoch_through(cache: LogitsCache, views: Views, epoch: int = 0, **loading: Any) -> dict[int, Tensor]:
    """Logits by index of one epoch; each batch against the model itself."""
    views.set_epoch(epoch)
    found: dict[int, Tensor] = {}
    for images, _, supp_dict in DataLoader(views, **{"batch_size": 5, "shuffle": True, **loading}):
        logits = cache.logits(images, supp_dict)
        assert logits.dtype == torch.float32 and not logits.requires_grad
        truth = cache.model.scale * cache.model.body(images)  # pyright: ignore[reportCallIssue]
        torch.testing.assert_close(logits, truth.half().float(), rtol=2e-3, atol=1e-6)
        found |= dict(zip(supp_dict["index"].tolist(), logits, strict=True))
    return found


def run(root: Path, model: Model, views: Views, epochs: int = VIEWS) -> int:
    """How many rows were missing in a run of its own; their batches, and no others, were computed."""
    model.seen = 0
    cache = open_cache(root, model, views)
    for epoch in range(epochs):
        epoch_through(cache, views, epoch)
    assert cache.misses <= model.seen <= 5 * cache.misses and cache.hits + cache.misses == epochs * SAMPLES
    return cache.misses


def the_folder(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


@pytest.mark.parametrize("loading", [{}, {"batch_size": 1}, {"batch_size": SAMPLES}, {"num_workers": 2}])
def test_each_view_is_computed_once(tmp_path, loading):
    model, views = Model(), views_of()
    cache = open_cache(tmp_path, model, views)
    epochs = [epoch_through(cache, views, epoch, **loading) for epoch in range(2 * VIEWS)]
    assert model.seen == cache.misses == VIEWS * SAMPLES == cache.hits
    for epoch in range(VIEWS):
        assert sorted(epochs[epoch]) == list(range(SAMPLES))
        for index, logits in epochs[epoch].items():
            assert torch.equal(logits, epochs[epoch + VIEWS][index]), "computed and read are the same numbers"
    assert run(tmp_path, Model(), views_of()) == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_it_is_rounded_to_float16(tmp_path):
    model, views = Model(), views_of()
    images, _, supp_dict = next(iter(DataLoader(views, batch_size=SAMPLES)))
    cache = open_cache(tmp_path, model, views)
    truth = model(images).detach()
    for _ in range(2):
        logits = cache.logits(images, supp_dict)
        assert torch.equal(logits, truth.half().float()) and not torch.equal(logits, truth)


def test_a_batch_of_views_out_of_order_with_a_sample_twice(tmp_path):
    model, views = Model(), views_of()
    items = [views.get(i, v) for i, v in ((3, 1), (3, 0), (3, 1), (22, 0), (0, 1))]
    images = torch.stack([image for image, *_ in items])
    supp_dict = {key: torch.tensor([item[2][key] for item in items]) for key in ("index", "view", "checksum")}
    cache = open_cache(tmp_path, model, views)
    for _ in range(2):
        assert torch.equal(cache.logits(images, supp_dict), Model()(images).half().float())
    assert (cache.misses, cache.hits) == (5, 5)


def test_another_process_reads_it(tmp_path):
    assert run(tmp_path, Model(), views_of()) == VIEWS * SAMPLES
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(run, (tmp_path, Model(), views_of())) == 0


def test_more_views_reuse_those_there(tmp_path):
    run(tmp_path, Model(), views_of())
    assert run(tmp_path, Model(), views_of(num_views=3), epochs=3) == SAMPLES


def one_weight(model: Model) -> Model:
    with torch.no_grad():
        model.get_parameter("body.1.weight")[0, 0] += 1e-6
    return model


def one_statistic(model: Model) -> Model:
    model.get_buffer("body.2.running_mean")[1] += 1e-6
    return model


def another_activation(model: Model) -> Model:
    model.body[3] = nn.GELU()
    return model


CHANGES: dict[str, Any] = {
    "weight": lambda: (one_weight(Model()), views_of(), "float32"),
    "buffer": lambda: (one_statistic(Model()), views_of(), "float32"),
    "structure": lambda: (another_activation(Model()), views_of(), "float32"),
    "seed": lambda: (Model(), views_of(seed=1), "float32"),
    "transform": lambda: (Model(), views_of(Data(noise=0.2)), "float32"),
    "mixup": lambda: (Model(), views_of(mixup_alpha=0.5, num_classes=CLASSES), "float32"),
    "precision": lambda: (Model(), views_of(), "bfloat16 autocast"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_makes_other_logits_makes_another_folder(tmp_path, change):
    assert run(tmp_path, Model(), views_of()) == VIEWS * SAMPLES
    before = {path: path.read_bytes() for path in the_folder(tmp_path).iterdir()}
    model, views, precision = CHANGES[change]()
    model.seen = 0
    epoch_through(open_cache(tmp_path, model, views, precision), views)
    assert model.seen == SAMPLES
    assert len(list(tmp_path.iterdir())) == 2
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run(tmp_path, Model(), views_of()) == 0


def test_precision_is_that_of_the_call(tmp_path):
    views = views_of()
    cached = CachedModel(tmp_path, Model(), "teacher", views, CLASSES)
    images, _, supp_dict = next(iter(DataLoader(views, batch_size=SAMPLES)))
    full = cached(images, supp_dict)
    with torch.autocast("cpu", torch.bfloat16):
        half = cached(images, supp_dict)
        assert torch.equal(half, Model()(images).float())
    assert not torch.equal(full, half) and len(list(tmp_path.iterdir())) == 2
    assert torch.equal(cached(images, supp_dict), full)
    assert cached.counts == (SAMPLES, 2 * SAMPLES)


def test_a_changed_image_is_computed_again(tmp_path):
    """One pixel of a sample that is no probe: the folder is the same, the row does not count."""
    run(tmp_path, Model(), views_of())
    data = Data()
    data.images[5, 0, 2, 2] += 0.5
    assert run(tmp_path, Model(), views_of(data)) == VIEWS
    assert len(list(tmp_path.iterdir())) == 1
    assert run(tmp_path, Model(), views_of(data)) == 0
    assert run(tmp_path, Model(), views_of()) == VIEWS, "and back"


def header_length(path: Path) -> int:
    return path.stat().st_size - cache_bytes(SAMPLES, CLASSES, 1)


@pytest.mark.parametrize("offset", [0, 5, 2 * CLASSES - 1, 2 * CLASSES, 2 * CLASSES + 3], ids=str)
def test_a_flipped_bit_costs_a_forward_pass(tmp_path, offset):
    """In the first, a middle and the last row's logits or checksum."""
    run(tmp_path, Model(), views_of())
    path = the_folder(tmp_path) / "view_0001.npy"
    content = bytearray(path.read_bytes())
    for row in (0, 11, SAMPLES - 1):
        content[header_length(path) + row * (2 * CLASSES + 4) + offset] ^= 0x10
    path.write_bytes(content)
    assert run(tmp_path, Model(), views_of()) == 3
    assert run(tmp_path, Model(), views_of()) == 0


def test_every_damaged_header_is_replaced(tmp_path):
    run(tmp_path, Model(), views_of(), epochs=1)
    path = the_folder(tmp_path) / "view_0000.npy"
    whole, model, views = path.read_bytes(), Model(), views_of()
    cache = open_cache(tmp_path, model, views)
    images, _, supp_dict = next(iter(DataLoader(views, batch_size=2)))
    for i in range(header_length(path)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x11]) + whole[i + 1 :])
        cache._files.clear()
        cache.logits(images, supp_dict)
        assert cache.misses == 2 * (i + 1), f"byte {i}"
        assert len(path.read_bytes()) == len(whole)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99, 1.1])
def test_a_view_file_of_another_length_is_replaced(tmp_path, caplog, keep):
    run(tmp_path, Model(), views_of())
    path = the_folder(tmp_path) / "view_0000.npy"
    whole = path.read_bytes()
    path.write_bytes((whole + bytes(1000))[: int(keep * len(whole))])
    assert run(tmp_path, Model(), views_of()) == SAMPLES
    assert "view_0000.npy are damaged: they are computed again" in caplog.text
    assert path.read_bytes() == whole
    assert path.stat().st_blocks * 512 >= len(whole), "the space is reserved"


def test_random_damage_never_gives_wrong_logits(tmp_path):
    """Bits flipped anywhere in the file, its header included; `epoch_through` compares with the model."""
    run(tmp_path, Model(), views_of(), epochs=1)
    path, random = the_folder(tmp_path) / "view_0000.npy", np.random.default_rng(0)
    whole = path.read_bytes()
    for bits in (1, 3, 10, 30, 100) * 4:
        content = np.unpackbits(np.frombuffer(whole, np.uint8))
        content[random.choice(len(content), bits, replace=False)] ^= 1
        path.write_bytes(np.packbits(content).tobytes())
        assert run(tmp_path, Model(), views_of(), epochs=1) > 0
        assert run(tmp_path, Model(), views_of(), epochs=1) == 0
        assert len(path.read_bytes()) == len(whole)


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.99])
def test_a_file_truncated_while_it_is_open(tmp_path, keep):
    """Neither a signal from a memory map nor a wrong number, in a process that has it open and in a new one."""
    model, views = Model(), views_of()
    cache = open_cache(tmp_path, model, views)
    epoch_through(cache, views)
    path = the_folder(tmp_path) / "view_0000.npy"
    size = path.stat().st_size
    for _ in range(2):
        os.truncate(path, int(keep * size))
        epoch_through(cache, views)
        assert cache.misses > SAMPLES
        assert run(tmp_path, Model(), views_of(), epochs=1) <= SAMPLES
        assert run(tmp_path, Model(), views_of(), epochs=1) == 0
        assert path.stat().st_size == size


def test_a_row_does_not_depend_on_which_others_were_there(tmp_path):
    """As when a process is killed amid a batch and another goes on: bit for bit the same."""

    class OfBatch(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.mean()  # real models differ in the last bits only

    model, views = OfBatch(), views_of()
    images, _, supp_dict = next(iter(DataLoader(views, batch_size=SAMPLES)))
    cache = open_cache(tmp_path, model, views)
    expected = cache.logits(images, supp_dict)
    path = the_folder(tmp_path) / "view_0000.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-7] + bytes(7))
    assert torch.equal(cache.logits(images, supp_dict), expected)
    assert cache.misses == SAMPLES + 1 and path.read_bytes() == content


def fill_a_share(root: Path, start: Any, share: int, shares: int) -> None:
    views = views_of(num_views=8)
    model = Model()
    start.wait(30)
    cache = open_cache(root, model, views)
    for view in range(8):
        views.set_epoch(view)
        images, _, supp_dict = next(iter(DataLoader(views, batch_size=SAMPLES)))
        supp_dict = {name: values[share::shares] for name, values in supp_dict.items()}
        cache.logits(images[share::shares], supp_dict)


def test_processes_that_begin_at_once_fill_the_same_files(tmp_path):
    context, shares = multiprocessing.get_context("fork"), 4
    for attempt in range(3):
        start, root = context.Barrier(shares), tmp_path / str(attempt)
        processes = [context.Process(target=fill_a_share, args=(root, start, i, shares)) for i in range(shares)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert run(root, Model(), views_of(num_views=8), epochs=8) == 0
        assert {path.name for path in the_folder(root).iterdir()} == {
            ".lock", "meta.json", *(f"view_{view:04}.npy" for view in range(8)),
        }  # fmt: skip


@pytest.mark.parametrize("name", ["meta.json", "view_0000.npy"])
def test_a_deleted_file_is_written_again(tmp_path, name):
    run(tmp_path, Model(), views_of())
    path = the_folder(tmp_path) / name
    whole = path.read_bytes()
    path.unlink()
    assert run(tmp_path, Model(), views_of()) == (SAMPLES if name.startswith("view") else 0)
    assert path.read_bytes() == whole


def test_meta_says_what_the_logits_are_of(tmp_path):
    views = views_of()
    run(tmp_path, Model(), views)
    meta = json.loads((the_folder(tmp_path) / "meta.json").read_text())
    probes = [0, 3, 6, 9, 12, 15, 18, 22]
    assert meta["images"] == [views.get(i, 0)[2]["checksum"] for i in probes]
    assert (meta["samples"], meta["classes"], meta["seed"], meta["precision"]) == (SAMPLES, CLASSES, 42, "float32")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "was made from another model, weights, images"),
        ("weights", "was made from another weights: delete the folder, or choose another cache_dir"),
        ("seed", "was made from another seed: delete the folder, or choose another cache_dir"),
    ],
)
def test_a_foreign_meta_is_refused(tmp_path, content, message):
    run(tmp_path, Model(), views_of())
    path = the_folder(tmp_path) / "meta.json"
    if isinstance(content, str):
        content = json.dumps(json.loads(path.read_text()) | {content: "of another"}).encode()
    path.write_bytes(content)
    with pytest.raises(CacheError) as error:
        run(tmp_path, Model(), views_of())
    assert message in str(error.value) and str(path.parent) in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b'{"model": "teacher"', b"\xff\xfe\x00", b""])
def test_a_damaged_meta_costs_the_logits(tmp_path, content, caplog):
    whole = run(tmp_path, Model(), views_of())
    folder = the_folder(tmp_path)
    meta = (folder / "meta.json").read_bytes()
    (folder / "meta.json").write_bytes(content)
    assert run(tmp_path, Model(), views_of()) == whole == VIEWS * SAMPLES
    assert (folder / "meta.json").read_bytes() == meta
    assert f"Cached logits in {folder} are damaged (meta.json): they are computed again" in caplog.text


@pytest.mark.parametrize("what", ["root", "folder", "meta.json", "view_0000.npy"])
def test_something_else_in_its_place(tmp_path, what):
    root = tmp_path / "cache"
    run(root, Model(), views_of())
    path = {"root": root, "folder": the_folder(root)}.get(what, the_folder(root) / what)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.touch() if what in ("root", "folder") else path.mkdir()
    with pytest.raises(CacheError, match=r"cannot be (used|written): (File exists|Not a directory|Is a directory)"):
        run(root, Model(), views_of())
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, there):
    if there:
        run(tmp_path, Model(), views_of(), epochs=1)

    def read_only(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "wb":
            raise OSError(30, os.strerror(30))
        return opened(self, mode, *args, **kwargs)

    opened = Path.open
    monkeypatch.setattr(Path, "open", read_only)
    if not there:
        monkeypatch.setattr(Path, "write_text", lambda *args: read_only(args[0], "wb"))
    with pytest.raises(CacheError, match=r"cannot be (used|written): Read-only file system"):
        run(tmp_path, Model(), views_of())


def test_a_disk_too_small(tmp_path, monkeypatch):
    needed, usage = cache_bytes(SAMPLES, CLASSES, VIEWS), namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 1))
    with pytest.raises(CacheError, match=r"2 views need 0.00 GB more in .*, where 0.00 GB are free: lower num_views"):
        run(tmp_path, Model(), views_of())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed))
    run(tmp_path, Model(), views_of())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0))
    assert run(tmp_path, Model(), views_of()) == 0, "what is there needs no more"


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    run(tmp_path, Model(), views_of(), epochs=1)

    def full(*args: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match=r"view_0001.npy cannot be written: No space left on device"):
        run(tmp_path, Model(), views_of())
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    assert run(tmp_path, Model(), views_of()) == SAMPLES


@pytest.mark.parametrize("scale", [1e6, float("inf"), float("nan")])
def test_logits_beyond_float16(tmp_path, scale):
    with pytest.raises(CacheError, match="do not fit the cache's float16: remove cache_dir"):
        run(tmp_path, Model(scale=scale), views_of())


def fill_and_hang(root: Path, hangs: Any, when: str) -> None:
    """Fill until the moment ``when``; then tell, and stay there."""

    def hang(*args: Any) -> None:
        hangs.set()
        time.sleep(60)

    class Slow(Model):
        def forward(self, x: Tensor) -> Tensor:
            if when == "computing" and self.seen >= 10:
                hang()
            return super().forward(x)

    Slow.__name__ = "Model"  # the same model to the cache
    model, views = Slow(), views_of()
    cache = open_cache(root, model, views)
    if when == "reserving":
        os.fsync = hang
    epoch_through(cache, views, shuffle=False)


@pytest.mark.parametrize(("when", "left"), [("computing", 2 * SAMPLES - 10), ("reserving", 2 * SAMPLES)])
def test_a_killed_process_leaves_a_cache_that_works(tmp_path, when, left):
    context = multiprocessing.get_context("fork")
    hangs = context.Event()
    process = context.Process(target=fill_and_hang, args=(tmp_path, hangs, when))
    process.start()
    assert hangs.wait(30)
    process.kill()
    process.join()
    assert process.exitcode == -9
    assert run(tmp_path, Model(), views_of()) == left
    assert run(tmp_path, Model(), views_of()) == 0
    assert len(list(tmp_path.iterdir())) == 1
