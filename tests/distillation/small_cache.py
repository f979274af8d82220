"""A small model, its views and their cache, for the tests of cached logits."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from timm_mamba_pkd.distillation.logits_cache import LogitsCache
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
