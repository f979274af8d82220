"""Replayable views: a view is a function of (seed, sample, view) alone."""

import random
import zlib
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets  # noqa: F401  (torchdistill.datasets.registry reads it)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchdistill.datasets.registry import get_dataset_wrapper
from torchdistill.datasets.wrapper import BaseDatasetWrapper

from timm_mamba_pkd.distillation.views import VIEWS, Views

SAMPLES, CLASSES = 12, 3
DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "python": random.random,
    "numpy": np.random.random,
    "none": lambda: 0.0,
}


class Data(Dataset):
    """Images with a random number added, drawn from the generator that ``draw`` names, and their labels."""

    def __init__(self, draw: str = "torch", shape: tuple[int, ...] = (2, 5, 7), classes: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(SAMPLES, *shape, generator=generator)
        self.targets = [i % CLASSES for i in range(SAMPLES)]
        self.draw = draw
        if classes:
            self.classes = list("abc")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] + DRAWS[self.draw](), self.targets[index]


def views_of(data: Any = None, **kwargs: Any) -> Views:
    return Views(data or Data(), **{"num_views": 3, **kwargs})


def states() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), name, np.asarray(keys).tolist(), rest]


def stir(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 0.5, "cutmix_alpha": 1.0, "num_classes": CLASSES}])
@pytest.mark.parametrize("draw", ["torch", "python", "numpy"])
def test_a_view_is_a_function_of_seed_sample_and_view(draw, mixing):
    views = views_of(Data(draw), **mixing)
    first = {(i, v): views.get(i, v) for i in range(SAMPLES) for v in range(3)}
    stir(99)
    again = views_of(Data(draw), **mixing)
    for i, v in sorted(first, key=lambda key: hash(key)):  # another order
        torch.testing.assert_close(again.get(i, v), first[i, v], rtol=0, atol=0)
    offsets = {image.sum().item() for image, *_ in first.values()}
    assert len(offsets) == len(first), "every sample and view has its own"
    other = views_of(Data(draw), seed=43, **mixing)
    assert all(not torch.equal(other.get(i, v)[0], image) for (i, v), (image, *_) in first.items())


def test_samples_draw_different_numbers():
    data = Data()
    views = views_of(data)
    added = [[(views.get(i, v)[0] - data.images[i]).mean().item() for v in range(3)] for i in range(SAMPLES)]
    assert len({round(number, 5) for row in added for number in row}) == SAMPLES * 3
    assert 0 < min(map(min, added)) < 0.2 and 0.8 < max(map(max, added)) < 1, "spread over [0, 1)"


@pytest.mark.parametrize("mixing", [{}, {"cutmix_alpha": 1.0, "num_classes": CLASSES}])
@pytest.mark.parametrize("draw", DRAWS)
def test_the_global_generators_are_as_they_were(draw, mixing):
    views = views_of(Data(draw), **mixing)
    stir(3)
    for draw_normal in (torch.randn, lambda n: random.gauss(0, n), np.random.standard_normal):
        draw_normal(1)  # the spare normal is part of the state
    before = states()
    views[4]
    assert states() == before


def test_the_global_generators_are_as_they_were_after_an_error():
    stir(3)
    before = states()
    with pytest.raises(IndexError):
        views_of()[SAMPLES]
    assert states() == before


@pytest.mark.parametrize(
    "loading",
    [
        {"num_workers": 0},
        {"num_workers": 0, "batch_size": 1, "shuffle": True},
        {"num_workers": 2, "batch_size": 5},
        {"num_workers": 2, "shuffle": True, "persistent_workers": True},
    ],
    ids=["main", "shuffled", "workers", "persistent"],
)
def test_loaders_and_epochs_change_nothing(loading):
    """Images and targets by index, of epochs in any order, against the views taken one by one."""
    views = views_of(mixup_alpha=0.8, num_classes=CLASSES)
    loader = DataLoader(views, **{"batch_size": 4, **loading})
    for epoch in (1, 0, 5, 3, 1):  # 5 and 3 are views 2 and 0
        stir(epoch)
        views.set_epoch(epoch)
        seen = []
        for images, targets, supp_dict in loader:
            assert set(supp_dict) == {"index", "view", "checksum"}
            assert all(value.dtype == torch.int64 and value.ndim == 1 for value in supp_dict.values())
            assert supp_dict["view"].tolist() == [epoch % 3] * len(images)
            for image, target, index, checksum in zip(
                images, targets, supp_dict["index"].tolist(), supp_dict["checksum"].tolist(), strict=True
            ):
                expected = views.get(index, epoch % 3)
                assert torch.equal(image, expected[0]) and torch.equal(target, expected[1])
                assert checksum == zlib.crc32(image.numpy().tobytes())
                seen.append(index)
        assert sorted(seen) == list(range(SAMPLES))


def test_a_changed_pixel_changes_the_checksum():
    data = Data("none")
    before = views_of(data).get(3, 0)[2]["checksum"]
    data.images[3, 1, 4, 6] += 1e-3
    assert views_of(data).get(3, 0)[2]["checksum"] != before


def one_hot(label: int) -> Tensor:
    return torch.eye(CLASSES)[label]


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 8, 8), (2, 1, 9)])
def test_mixup_is_a_mixture_of_two_images_and_of_their_labels(shape):
    data = Data("none", shape)
    views, shares = views_of(data, mixup_alpha=1.0, num_classes=CLASSES, num_views=20), []
    for i in range(SAMPLES):
        for v in range(20):
            image, target, _ = views.get(i, v)
            assert image.dtype == target.dtype == torch.float32 and image.shape == shape
            # The partner and the share, from the image alone.
            found = []
            for j, other in enumerate(data.images):
                direction = data.images[i] - other
                share = ((image - other) * direction).sum() / direction.square().sum().clamp_min(1e-9)
                mixture = other + share * direction
                if torch.allclose(mixture, image, atol=1e-4):
                    found.append((j, share.item()))
            j, share = found[0] if len(found) == 1 else (i, 1.0)  # with itself every share gives the image
            assert len(found) == 1 or torch.allclose(image, data.images[i], atol=1e-4)
            expected = share * one_hot(data.targets[i]) + (1 - share) * one_hot(data.targets[j])
            torch.testing.assert_close(target, expected, atol=1e-3, rtol=0)
            shares.append(share)
            assert target.sum().item() == pytest.approx(1) and target.min() >= 0
    assert 0.4 < np.mean(shares) < 0.6 and min(shares) < 0.1 and max(shares) > 0.9, "uniform: Beta(1, 1)"


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 8, 8), (2, 1, 9), (1, 28, 28)])
def test_cutmix_pastes_a_rectangle_and_the_labels_share_is_that_of_the_pixels(shape):
    data, pasted = Data("none", shape), 0
    views = views_of(data, cutmix_alpha=1.0, num_classes=CLASSES, num_views=20)
    for i in range(SAMPLES):
        for v in range(20):
            image, target, _ = views.get(i, v)
            kept = (image == data.images[i]).all(0)
            own = kept.float().mean().item()
            assert target.sum().item() == pytest.approx(1)
            if kept.all():
                assert target[data.targets[i]] == 1
                continue
            pasted += 1
            (j,) = (j for j, other in enumerate(data.images) if torch.equal(image[:, ~kept], other[:, ~kept]))
            rows, columns = (~kept).nonzero(as_tuple=True)
            box = ~kept[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.all(), "the pasted pixels are a rectangle"
            expected = own * one_hot(data.targets[i]) + (1 - own) * one_hot(data.targets[j])
            torch.testing.assert_close(target, expected)
    assert (pasted > 100) == (shape[-2] > 1), "a row of one pixel cannot be cut"


def test_mixing_leaves_the_data_set_alone():
    data = Data("none")
    before = data.images.clone()
    for v in range(10):
        views_of(data, mixup_alpha=0.5, cutmix_alpha=0.5, num_classes=CLASSES).get(0, v)
    assert torch.equal(data.images, before)


def test_both_kinds_of_mixture_take_turns():
    data = Data("none")
    views = views_of(data, mixup_alpha=0.5, cutmix_alpha=1.0, num_classes=CLASSES)
    cut = [bool((views.get(i, v)[0] == data.images[i]).any()) for i in range(SAMPLES) for v in range(30)]
    assert 0.3 < np.mean(cut) < 0.75  # some mixtures are with the image itself


@pytest.mark.parametrize("data", [Data(classes=True), Subset(Subset(Data(classes=True), range(9)), range(5))])
def test_classes_of_the_data_set_are_found(data):
    assert views_of(data, mixup_alpha=0.5)[0][1].shape == (CLASSES,)
    assert views_of(data, mixup_alpha=0.5, num_classes=7)[0][1].shape == (7,)


def test_targets_stay_as_they_are_without_mixing():
    assert [views_of()[i][1] for i in range(SAMPLES)] == Data().targets


@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 0.5}])
def test_a_wrapper_of_torchdistill_between(mixing):
    crd = {"key": "CRDDatasetWrapper", "kwargs": {"num_negative_samples": 4, "mode": "relax", "ratio": 1.0}}
    views = views_of(Data(classes=True), wrapper=crd, **mixing)
    stir(0)
    first = [views[i][2] for i in range(SAMPLES)]
    stir(1)
    for i, supp_dict in enumerate(first):
        assert supp_dict["index"] == supp_dict["pos_idx"] == i
        contrast = supp_dict["contrast_idx"]
        assert contrast[0] % CLASSES == i % CLASSES and (contrast[1:] % CLASSES != i % CLASSES).all()
        assert (views[i][2]["contrast_idx"] == contrast).all(), "replayable as well"
    (_, _, supp_dict) = next(iter(DataLoader(views, batch_size=4)))
    assert supp_dict["contrast_idx"].shape == (4, 5)


def test_a_wrapper_with_positional_arguments():
    crd = {"key": "CRDDatasetWrapper", "args": [4, "exact", 1.0]}
    assert views_of(Data(classes=True), wrapper=crd)[2][2]["contrast_idx"].shape == (5,)


def test_torchdistill_finds_the_views():
    wrapped = get_dataset_wrapper(VIEWS)(BaseDatasetWrapper(Data()), num_views=1)
    assert isinstance(wrapped, Views)
    assert len(wrapped) == SAMPLES and wrapped[1][2]["view"] == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_views": 0}, "views: num_views must be an integer of at least 1, got 0"),
        ({"num_views": 1.5}, "views: num_views must be an integer of at least 1, got 1.5"),
        ({"seed": -1}, "views: seed must be an integer of at least 0, got -1"),
        ({"seed": "1"}, "views: seed must be an integer of at least 0, got '1'"),
        ({"mixup_alpha": -0.1}, "views: mixup_alpha must be a number of at least 0, got -0.1"),
        ({"mixup_alpha": float("nan")}, "views: mixup_alpha must be a number of at least 0, got nan"),
        ({"cutmix_alpha": float("inf")}, "views: cutmix_alpha must be a number of at least 0, got inf"),
        ({"cutmix_alpha": "1e-1"}, "views: cutmix_alpha must be a number of at least 0, got '1e-1'"),
        ({"mixup_alpha": 0.5}, "views: mixup and cutmix need num_classes, which this data set does not tell"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        views_of(**kwargs)


def test_a_label_beyond_the_classes():
    views = views_of(mixup_alpha=0.5, num_classes=2)
    with pytest.raises(ValueError, match="views: label 2 is none of 2 classes: set views' num_classes"):
        [views[i] for i in range(SAMPLES)]
