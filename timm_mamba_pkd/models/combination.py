"""How an ensemble's prediction is made of its students' logits: the mean, or weights fitted on held-out data."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

COMBINATIONS = ("mean", "per_student", "per_class")


def uniform_weights(
    num_students: int, num_classes: int, combination: str, device: torch.device | None = None
) -> Tensor | None:
    """Weights that make `combine` the running mean: None for 'mean', else row k - 1 holds 1/k for the first k students.

    Shape (N, N) for 'per_student', (N, N, num_classes) for 'per_class'; float32.

    Raises:
        ValueError: no such combination.
    """
    if combination not in COMBINATIONS:
        raise ValueError(
            f"combination must be {', '.join(COMBINATIONS[:-1])} or {COMBINATIONS[-1]}, got {combination!r}"
        )
    if combination == "mean":
        return None
    rows = torch.ones(num_students, num_students, device=device).tril()
    rows = rows / rows.sum(1, keepdim=True)
    return rows if combination == "per_student" else rows[:, :, None].repeat(1, 1, num_classes)


def combine(student_logits: Tensor | Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """Ensemble logits after each student, (k, B, C), from the students' own, (k, B, C).

    Args:
        student_logits: of k students, in the order of evaluation; one tensor or a sequence of (B, C).
        weights: None for the mean, or as `uniform_weights` makes them; the first k rows are used.
    """
    k = len(student_logits)
    stacked = student_logits if isinstance(student_logits, Tensor) else torch.stack(tuple(student_logits))
    if weights is None:
        return stacked.cumsum(0) / torch.ones_like(stacked[:, :1, :1]).cumsum(0)
    equation = "kt,tbc->kbc" if weights.ndim == 2 else "ktc,tbc->kbc"
    return torch.einsum(equation, weights[:k, :k].type_as(stacked), stacked)


def fit_weights(student_logits: Tensor, targets: Tensor, per_class: bool, penalty: float = 20.0) -> Tensor:
    """Weights (k,), or (k, C) if ``per_class``, of k students' logits that predict held-out labels best.

    They minimise the sum of the samples' cross-entropies plus ``penalty`` times the mean squared distance of ``k w``
    from 1: a prior, so that few samples leave the mean as it is. Both terms are convex; L-BFGS, in float64.

    Args:
        student_logits: (k, N, C).
        targets: int64 labels (N,).
        per_class: a weight for each student and class instead of one for each student.
        penalty: strength of the pull towards the mean, in nats; 20 was chosen once and for all.
    """
    logits = student_logits.detach().double()
    k, _, num_classes = logits.shape
    scale = torch.ones(k, num_classes if per_class else 1, dtype=torch.double, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        combined = (scale[:, None] / k * logits).sum(0)
        loss = F.cross_entropy(combined, targets) + penalty / len(targets) * (scale - 1).square().mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weights = (scale.detach() / k).float()
    return weights if per_class else weights[:, 0]
