"""Accuracy of classifiers, and of every student and every partial ensemble in one pass.

Several processes share the batches, each of which is counted once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_mamba_pkd.distributed import all_sum, share_of
from timm_mamba_pkd.models import MambaPKDEnsemble
from timm_mamba_pkd.runner.device import autocast
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.progress import progress
from timm_mamba_pkd.runner.streams import ReadableStream


def count_correct(logits: Tensor, targets: Tensor, topk: Sequence[int]) -> Tensor:
    """How many of the targets (B,) are among the k largest logits (..., B, C), for each k: (..., len(topk)) int64."""
    ranked = logits.topk(max(topk), dim=-1).indices
    hits = ranked == targets[:, None]
    return torch.stack([hits[..., :k].any(-1).sum(-1) for k in topk], dim=-1)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    topk: Sequence[int],
    amp: torch.dtype | None = None,
    title: str = "",
) -> list[float]:
    """Top-k accuracies of ``model`` in percent, in the order of ``topk``. The model is left in its mode."""
    correct, total = torch.zeros(len(topk), dtype=torch.int64), 0
    was_training = model.training
    model.eval()
    for images, targets, *_ in progress(share_of(loader), title):
        with autocast(device, amp):
            logits = model(images.to(device))
        correct += count_correct(logits.float(), targets.to(device), topk).cpu()
        total += len(targets)
    model.train(was_training)
    correct, total = all_sum(correct), all_sum(torch.tensor(total))
    _require_all(loader, int(total))
    return (100 * correct / total).tolist()


@torch.inference_mode()
def evaluate_ensemble(
    ensemble: MambaPKDEnsemble,
    loader: DataLoader,
    device: torch.device,
    amp: torch.dtype | None = None,
    title: str = "",
) -> tuple[list[float], list[float]]:
    """Top-1 of each active student alone, and of the ensemble after k students for every k, in percent."""
    correct, total = torch.zeros(2, ensemble.num_active, dtype=torch.int64), 0
    was_training = ensemble.training
    ensemble.eval()
    for images, targets, *_ in progress(share_of(loader), title):
        with autocast(device, amp):
            students = ensemble.student_logits(images.to(device)).float()
        both = torch.stack([students, ensemble.combine(students)])
        correct += count_correct(both, targets.to(device), (1,))[..., 0].cpu()
        total += len(targets)
    ensemble.train(was_training)
    correct, total = all_sum(correct), all_sum(torch.tensor(total))
    _require_all(loader, int(total))
    alone, together = (100 * correct / total).tolist()
    return alone, together


def _require_all(loader: DataLoader, seen: int) -> None:
    """Raise a ConfigError if not every sample of a stream was seen: timm's readers pass over broken ones."""
    stream = getattr(loader, "dataset", None)
    if isinstance(stream, ReadableStream) and seen != stream.num_samples:
        raise ConfigError(
            f"data set '{stream.name}' gave {seen} samples instead of {stream.num_samples}: an evaluation leaves "
            "nothing out; either timm's warnings say what cannot be read, or num_samples is wrong"
        )
