"""The validation split: found, and refused where the test set has samples of it."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset
from torchdistill.datasets.util import split_dataset

from timm_mamba_pkd.datasets import Digits
from timm_mamba_pkd.runner import ConfigError
from timm_mamba_pkd.runner.streams import ReadableStream
from timm_mamba_pkd.runner.unreadable import Readable
from timm_mamba_pkd.runner.validation import validation_split

PATH = Path("config.yaml")
ENDING = ", on which nothing may be fitted or chosen: do otherwise"


class Images(Dataset):
    """As torchvision keeps them; a transform changes what is seen."""

    def __init__(self, seed: int = 0, count: int = 20, brighter: float = 0.0, root: str = "data") -> None:
        rng = np.random.default_rng(seed)
        self.root = root
        self.data = rng.random((count, 1, 2, 2), dtype=np.float32)
        self.targets = torch.from_numpy(rng.integers(0, 3, count))
        self.reader = SimpleReader([f"{seed}/{i}.png" for i in range(count)])
        self.loader = Path.read_bytes
        self.transform = lambda image: image + brighter

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.transform(self.data[index])), int(self.targets[index])


class SimpleReader:
    def __init__(self, samples: list[str]) -> None:
        self.samples = samples


class Flow(IterableDataset):
    def __init__(self, images: Dataset) -> None:
        self.images: Any = images

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Any:
        yield from (self.images[i] for i in range(len(self.images)))


def split(val: Any, test: Any, loader: Any = None) -> tuple[str, Any]:
    loader = {"dataset_id": "val"} if loader is None else loader
    return validation_split({"val": val, "test": test}, loader, "test", PATH, "do otherwise")


def refused(val: Any, test: Any, loader: Any = None) -> str:
    with pytest.raises(ConfigError) as caught:
        split(val, test, loader)
    return str(caught.value)


def begins(relation: str) -> str:
    return f"the validation split of config.yaml, 'val', {relation}{ENDING}"


def test_a_split_of_its_own():
    for val, test in [
        (Images(0), Images(1)),
        (Digits("val"), Digits("test")),
        (Subset(Images(0), [3, 1]), Subset(Images(0), [2, 0])),
        (Subset(Images(0), [3, 1]), Subset(Images(1), [3, 1])),
        (Flow(Images(0)), Images(0)),
    ]:
        name, found = split(val, test)
        assert name == "val"
        assert found is val or (isinstance(found, Readable) and found.dataset is val)
        prepared = Readable(Images(0), "val", training=False)
        assert split(prepared, Images(1))[1] is prepared


def parts(lengths: list[int], seed: int, transforms: bool) -> list[Any]:
    """torchdistill's split, in which with transforms each part has a copy of the data."""
    changes: Any = [{"transform": partial(np.add, i)} for i in range(len(lengths))] if transforms else None
    return list(split_dataset(Images(), lengths, seed, changes))


@pytest.mark.parametrize("transforms", [False, True])
def test_parts_of_one_split_share_nothing(transforms):
    _, val, test = parts([10, 5, 5], 0, transforms)
    split(val, test)


@pytest.mark.parametrize("transforms", [False, True])
def test_parts_of_two_splits(transforms):
    _, val, test = parts([10, 5, 5], 0, transforms)
    _, other = parts([10, 10], 1, transforms)
    shared = len({*val.indices} & {*other.indices})
    assert 0 < shared < 5
    assert refused(val, other) == begins(f"shares {shared} of its 5 samples with the test set, 'test'")
    assert refused(val, Readable(test.dataset, "test", training=False)).startswith(
        begins("shares 5 of its 5 samples with the test set, 'test'")
    )


def test_whatever_holds_the_samples():
    """One object or two, with other transforms, parts of parts, in any order, as tensors."""
    data = Images()
    backwards = Subset(Subset(data, list(range(19, -1, -1))), torch.tensor([0, 5, 7]))  # type: ignore[arg-type]
    message = begins("shares 1 of its 3 samples with the test set, 'test'")
    for other in (data, copy.deepcopy(data), Images(brighter=0.5)):
        assert refused(backwards, Subset(other, [1, 2, 14])) == message
        split(backwards, Subset(other, [1, 2, 13]))
    assert "shares 20 of its 20" in refused(Images(), Images(brighter=0.5))  # all are other pixels
    for other in (Images(root="elsewhere"), Images(seed=1), Images(count=21)):
        split(Subset(data, [12]), Subset(other, [3, 12]))


def test_the_test_set_by_its_name_and_by_its_first_samples():
    assert refused(Images(0), Images(1), {"dataset_id": "test"}) == (
        "the validation split of config.yaml, 'test', is the test set, on which nothing may be fitted or chosen: "
        "do otherwise"
    )
    alike = begins("begins with the same samples as the test set, 'test'")
    assert refused(Images(), Images(root="elsewhere")) == alike
    assert refused(*(ReadableStream(Flow(Images()), name, False) for name in ("val", "test"))) == alike
    assert refused(ReadableStream(Flow(Images()), "val", False), Readable(Images(), "test", False)) == alike
    split(Images(0), Images(0, brighter=0.5, root="elsewhere"))  # what the docstring says is not found


def test_no_split():
    for loader in ({"dataset_id": "other"}, {}, "val", []):
        assert refused(Images(0), Images(1), loader) == "config.yaml names no validation split: do otherwise"
    assert refused(Subset(Images(), []), Images(1)) == (
        "the validation split of config.yaml, 'val', is empty: do otherwise"
    )


def test_what_cannot_be_compared_is_another():
    """A data set that holds itself, and one whose comparison has no answer."""
    one, other = Images(), Images()
    one.again, other.again = one, other  # type: ignore[attr-defined]
    split(Subset(one, [12]), Subset(other, [1, 12]))
    one, other = Images(), Images()
    one.parts, other.parts = [torch.zeros(2)], [torch.zeros(2)]  # type: ignore[attr-defined]
    split(Subset(one, [12]), Subset(other, [1, 12]))
