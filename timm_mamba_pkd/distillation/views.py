"""Replayable augmented views of a data set: view v of sample i is a function of (seed, i, v) alone."""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset
from torchdistill.datasets.registry import get_dataset_wrapper, register_dataset_wrapper

from timm_mamba_pkd.datasets import num_classes as num_classes_of

VIEWS = "mamba_pkd_views"
STREAM = "mamba_pkd_stream"


class Views(Dataset):
    """A data set whose augmentations are drawn from generators seeded by (seed, sample, view).

    An item is (image, target, supp_dict) with supp_dict's ``index``, ``view`` and ``checksum`` (CRC-32 of the image),
    each an int. In epoch e of a stage every sample shows its view ``e % num_views``; workers, ranks and restarts change
    nothing. Transforms may draw from torch's, Python's or NumPy's global generator.

    With mixup (arXiv 1710.09412) or cutmix (1905.04899) a view is a mixture with another sample, drawn anew for every
    sample and view, and the target becomes the classes' shares, float32 (num_classes,). Names and the even choice
    between the two are timm's.

    Args:
        org_dataset: of (image, label), the image a float tensor (C, H, W), all of one size with mixup and cutmix.
        num_views: how many views a sample has.
        seed: of all views.
        mixup_alpha, cutmix_alpha: parameter of the Beta distribution of the mixture, 0 for none.
        num_classes: needed with mixup and cutmix where the data set does not list its ``classes``.
        wrapper: torchdistill dataset wrapper between data set and views, ``{key: ..., args: ..., kwargs: ...}``.

    Raises:
        ValueError: arguments out of range, or an unknown number of classes.
    """

    def __init__(
        self,
        org_dataset: Any,
        num_views: int,
        seed: int = 42,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        num_classes: int | None = None,
        wrapper: dict[str, Any] | None = None,
    ) -> None:
        check_views(num_views=num_views, seed=seed, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)
        self.num_views = num_views
        self.seed = seed
        self.alphas = (float(mixup_alpha), float(cutmix_alpha))
        self.num_classes = num_classes or num_classes_of(org_dataset)
        if self.mixes and self.num_classes is None:
            raise ValueError("views: mixup and cutmix need num_classes, which this data set does not tell")
        if wrapper:
            org_dataset = get_dataset_wrapper(wrapper["key"])(
                org_dataset, *(wrapper.get("args") or ()), **(wrapper.get("kwargs") or {})
            )
        self.org_dataset = org_dataset
        self.view = torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes see it change

    @property
    def mixes(self) -> bool:
        return max(self.alphas) > 0

    def set_epoch(self, epoch: int) -> None:
        """Show the views of epoch ``epoch`` (from 0) of a stage."""
        self.view.fill_(epoch % self.num_views)

    def __len__(self) -> int:
        return len(self.org_dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, dict[str, Any]]:
        return self.get(index, int(self.view))

    def get(self, index: int, view: int) -> tuple[Tensor, Any, dict[str, Any]]:
        """View ``view`` of sample ``index``."""
        with seeded(self.seed, index, view):
            image, target, supp_dict = self._sample(index)
            if self.mixes:
                image, target = self._mix(image, target)
        checksum = zlib.crc32(np.ascontiguousarray(image).data)
        return image, target, {**supp_dict, "index": index, "view": view, "checksum": checksum}

    def _sample(self, index: int) -> tuple[Tensor, Any, dict[str, Any]]:
        image, target, *rest = self.org_dataset[index]
        return image, target, rest[0] if rest else {}

    def _mix(self, image: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(np.random.randint(2**31, size=4))
        mixup, cutmix = self.alphas
        other, other_target, _ = self._sample(int(rng.integers(len(self))))
        cuts = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
        alpha = cutmix if cuts else mixup
        share = rng.beta(alpha, alpha)
        if cuts:
            height, width = image.shape[-2:]
            side = (1 - share) ** 0.5
            y, x = rng.integers(height), rng.integers(width)
            top, bottom = np.clip([y - int(height * side / 2), y + int(height * side / 2)], 0, height)
            left, right = np.clip([x - int(width * side / 2), x + int(width * side / 2)], 0, width)
            image = image.clone()
            image[..., top:bottom, left:right] = other[..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            image = share * image + (1 - share) * other
        return image, share * self._one_hot(target) + (1 - share) * self._one_hot(other_target)

    def _one_hot(self, target: Any) -> Tensor:
        assert self.num_classes is not None
        if not 0 <= int(target) < self.num_classes:
            raise ValueError(f"views: label {target} is none of {self.num_classes} classes: set views' num_classes")
        return F.one_hot(torch.tensor(int(target)), self.num_classes).float()


@register_dataset_wrapper(key=STREAM)
class Stream(IterableDataset):
    """An iterable data set as (image, target, {}): without an index there are no views to repeat and nothing to cache.

    Args:
        org_dataset: of (image, label), iterable.
        num_views: how many views a sample would have to have; None for as many as there are passes.

    Raises:
        ValueError: views with mixup or cutmix, or with another wrapper below them, which need an index.
    """

    def __init__(self, org_dataset: Any, num_views: int | None = None, **views: Any) -> None:
        needs = [name for name in ("mixup_alpha", "cutmix_alpha", "wrapper") if views.get(name)]
        if needs:
            raise ValueError(f"views: data that are read as a stream have no index, which {needs[0]} needs: remove it")
        self.org_dataset = org_dataset
        self.num_views = num_views

    def __len__(self) -> int:
        return len(self.org_dataset)

    def __iter__(self) -> Iterator[tuple[Tensor, Any, dict[str, Any]]]:
        for image, target, *_ in self.org_dataset:
            yield image, target, {}


@register_dataset_wrapper(key=VIEWS)
def make_views(org_dataset: Any, **kwargs: Any) -> Views | Stream:
    """The `Views` of a data set, or the `Stream` of one that has no index."""
    return (Stream if isinstance(org_dataset, IterableDataset) else Views)(org_dataset, **kwargs)


def check_views(**values: Any) -> None:
    """Raise a ValueError for parameters of `Views` that are out of range."""
    num_views, seed = values.get("num_views", 1), values.get("seed", 0)
    if not isinstance(num_views, int) or num_views < 1:
        raise ValueError(f"views: num_views must be an integer of at least 1, got {num_views!r}")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"views: seed must be an integer of at least 0, got {seed!r}")
    for name in ("mixup_alpha", "cutmix_alpha"):
        alpha = values.get(name, 0.0)
        if not isinstance(alpha, (int, float)) or not 0 <= alpha < float("inf"):
            raise ValueError(f"views: {name} must be a number of at least 0, got {alpha!r}")


@contextmanager
def seeded(*seeds: int) -> Iterator[None]:
    """The global generators of torch, Python and NumPy seeded by ``seeds``; afterwards they are as they were."""
    first, second, third, fourth = (int(word) for word in np.random.SeedSequence(seeds).generate_state(4))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed((first << 32) | second)
    random.seed(third)
    np.random.seed(fourth)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
