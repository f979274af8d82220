"""Soft targets, as several rules use them."""

from torch import Tensor
from torch.nn import functional as F


def soft_loss(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL divergence from target to student logits, (B, C) each, at a temperature, times its square; mean over B.

    Hinton et al., arXiv 1503.02531.
    """
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(target / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def require(condition: bool, rule: str, name: str, allowed: str, value: object) -> None:
    """Raise the ValueError of a parameter out of range."""
    if not condition:
        raise ValueError(f"{rule}: {name} must be {allowed}, got {value}")
