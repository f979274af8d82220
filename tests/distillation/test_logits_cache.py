"""Cached logits are the computed ones, rounded to float16, whatever happened to the folder."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_cache import CLASSES, SAMPLES, VIEWS, Data, Model, epoch_through, open_cache, run, the_folder, views_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_mamba_pkd.distillation import CacheError
from timm_mamba_pkd.distillation.logits_cache import CachedModel, cache_bytes

pytestmark = pytest.mark.fault


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


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    opened, path_open = [], Path.open
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: opened.append(path_open(*args, **kwargs)) or opened[-1])
    views = views_of(num_views=9)
    cache = open_cache(tmp_path, Model(), views)
    for _ in range(2):
        for epoch in range(9):
            epoch_through(cache, views, epoch)
            assert sum(not file.closed for file in opened) <= 4
    assert cache.misses == cache.hits == 9 * SAMPLES


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


def test_files_of_another_model_do_not_count(tmp_path):
    run(tmp_path / "one", Model(), views_of())
    run(tmp_path / "two", Model(seed=1), views_of())
    for file in the_folder(tmp_path / "two").glob("view_*.npy"):
        shutil.copy(file, the_folder(tmp_path / "one"))
    assert run(tmp_path / "one", Model(), views_of()) == VIEWS * SAMPLES
    assert run(tmp_path / "one", Model(), views_of()) == 0


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
