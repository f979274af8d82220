import hashlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.data import Subset

from timm_mamba_pkd.datasets import Digits, num_classes

SIZES = {"train": 1257, "val": 180, "test": 360}


@pytest.fixture(scope="module")
def truth() -> tuple[np.ndarray, np.ndarray]:
    """All images, in the order and with the values (0 to 16) of scikit-learn, and their labels."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return data.images, data.target


@pytest.fixture(scope="module")
def indices(truth) -> dict[str, list[int]]:
    """Which of all images a split has. Every image occurs once: look-alikes are told apart by their order."""
    unused: dict[bytes, list[int]] = {}
    for index, (image, label) in enumerate(zip(*truth, strict=True)):
        unused.setdefault((image * 255 / 16).round().astype(np.uint8).tobytes() + bytes([label]), []).append(index)
    return {
        name: [unused[np.asarray(image).tobytes() + bytes([label])].pop(0) for image, label in items(name)]
        for name in SIZES
    }


def items(split) -> list:
    data = Digits(split)
    return [data[index] for index in range(len(data))]


def test_splits_are_the_whole_and_disjoint(indices):
    assert {name: len(split) for name, split in indices.items()} == SIZES
    assert sorted(index for split in indices.values() for index in split) == list(range(1797))


def test_splits_have_the_classes_in_equal_shares(truth, indices):
    shares = np.bincount(truth[1]) / 1797
    for name, split in indices.items():
        counts = np.bincount(truth[1][split], minlength=10)
        np.testing.assert_allclose(counts, shares * SIZES[name], atol=1, err_msg=name)


def test_splits_are_these_for_ever(indices):
    text = " ".join(f"{name} {sorted(split)}" for name, split in indices.items())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "d9b489082e0ac9a3"


def test_splits_do_not_depend_on_the_random_state():
    np.random.seed(1)
    first = Digits("val")
    np.random.seed(2)
    second = Digits("val")
    np.testing.assert_array_equal(first.images, second.images)
    assert first.targets == second.targets


def test_items_are_grey_images_with_their_labels():
    for image, label in items("val"):
        assert image.mode == "L"
        assert image.size == (8, 8)
        assert type(label) is int
    brightness = np.asarray(Digits("train").images)
    assert (brightness.min(), brightness.max()) == (0, 255)
    assert Digits().classes == list("0123456789")
    assert len(Digits()) == len(Digits().targets) == 1257


def test_transform():
    plain, doubled = Digits("test"), Digits("test", transform=lambda image: 2.0 * np.asarray(image))
    np.testing.assert_array_equal(doubled[7][0], 2.0 * np.asarray(plain[7][0]))
    assert doubled[7][1] == plain[7][1]


def test_index_past_the_end():
    assert sum(1 for _ in Digits("val")) == 180  # pyright: ignore[reportArgumentType]
    with pytest.raises(IndexError):
        Digits("val")[180]


def test_unknown_split():
    with pytest.raises(ValueError, match="split must be train, val or test, got 'valid'"):
        Digits("valid")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("module", ["sklearn.datasets", "sklearn.model_selection"])
def test_missing_scikit_learn(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"Digits needs scikit-learn: pip install 'timm_mamba_pkd\[demo\]'"):
        Digits()


def test_number_of_classes():
    assert num_classes(Subset(Subset(Digits("val"), [1]), [0])) == 10
    assert num_classes([1, 2]) is None
    reader = SimpleNamespace(class_to_idx={"tabby": 3, "tiger cat": 3, "dog": 0})
    assert num_classes(Subset(SimpleNamespace(reader=reader), [])) == 4  # pyright: ignore[reportArgumentType]
    assert num_classes(SimpleNamespace(reader=SimpleNamespace(class_to_idx={}))) is None
