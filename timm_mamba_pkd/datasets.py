"""scikit-learn's bundled handwritten digits as a torchvision-style data set, and what data sets tell of themselves."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset


class Digits(Dataset):
    """1,797 grey 8x8 images of handwritten digits (UCI optdigits' test set), split once and for all.

    Args:
        split: 'train' (1,257 images), 'val' (180) or 'test' (360), each with the classes in equal shares.
        transform: applied to each image, a PIL image of mode 'L', as in torchvision.

    Raises:
        ImportError: scikit-learn is missing; the message says how to get it.
        ValueError: no such split.
    """

    classes = [str(digit) for digit in range(10)]  # noqa: RUF012  (torchvision's attribute)

    def __init__(
        self, split: Literal["train", "val", "test"] = "train", transform: Callable[[Image.Image], Any] | None = None
    ) -> None:
        if split not in ("train", "val", "test"):
            raise ValueError(f"split must be train, val or test, got {split!r}")
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError("Digits needs scikit-learn: pip install 'timm_mamba_pkd[demo]'") from error
        images, labels = load_digits(return_X_y=True)
        rest, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
        train, val = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
        chosen = {"train": train, "val": val, "test": test}[split]
        self.images = (images[chosen].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        self.targets = labels[chosen].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def transform_of(dataset: Any) -> Any:
    """The transform of a data set, or of the one within it; None without."""
    while not hasattr(dataset, "transform") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return getattr(dataset, "transform", None)


def num_classes(dataset: Any) -> int | None:
    """How many classes a data set declares: by torchvision's ``classes`` or timm's ``reader.class_to_idx``.

    Wrappers that keep their data set under ``dataset``, as Subset does, are seen through.
    """
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    reader = getattr(dataset, "reader", None)
    classes = getattr(dataset, "classes", None) or getattr(reader, "class_to_idx", None)
    if not classes:
        return None
    return 1 + max(classes.values()) if isinstance(classes, dict) else len(classes)
