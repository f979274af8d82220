"""Cached logits that several processes compute and read, one of them killed."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
from small_cache import SAMPLES, VIEWS, Model, epoch_through, open_cache, run, the_folder, views_of
from torch import Tensor
from torch.utils.data import DataLoader

pytestmark = pytest.mark.fault


def test_another_process_reads_it(tmp_path):
    assert run(tmp_path, Model(), views_of()) == VIEWS * SAMPLES
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(run, (tmp_path, Model(), views_of())) == 0


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
