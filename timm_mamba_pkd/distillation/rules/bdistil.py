"""Boosting in function space: each student is trained where the ones before it are furthest from the teacher."""

import math

import torch
from torch import Tensor

from timm_mamba_pkd.distillation.rules.distil import require
from timm_mamba_pkd.distillation.rules.rule import Batch, Rule, Verdict


class BDistil(Rule):
    """B-DISTIL, progressive ensemble distillation (arXiv 2302.10093).

    Weights K+ and K- over samples i, a distribution for each class j, say where the students so far are below (K+) and
    above (K-) the teacher g. Student f_t minimises the squared logit error with a log-barrier that keeps it a weak
    learner: for every class j its *edges*

        e+_j = sum_i K+_ij (f_t - g)_j(x_i) / s_j    and    e-_j = sum_i K-_ij (g - f_t)_j(x_i) / s_j

    must be at least ``-slack``, where s_j is the mean of |f_t - g|_j over the samples. Without slack the two
    inequalities contradict each other in the first stage, where K+ = K-: they would force equality. After the stage
    ``K+ *= exp(-step_size (f_t - g))`` and ``K- *= exp(+step_size (f_t - g))``, each normalised over the samples.

    Inside a batch the edges are estimated from its samples, and the barrier is the log-barrier extension of arXiv
    1904.04205, which is finite outside the allowed region too.

    Args:
        weight: factor of the term, positive.
        step_size: eta of the weights' update, in inverse logits; positive, up to 1. 0.05 suits logits of about 10.
        barrier: gamma, positive: the barrier's part is divided by it; the larger, the sharper.
        slack: of the edges, which are between about -1 and 1; from 0 to 1.
        max_retries: how often a student that is no weak learner is trained again with connections to one more of the
            students before it; 0 or more.
    """

    sees_earlier = False
    judges = True

    k_plus: Tensor
    k_minus: Tensor

    def __init__(
        self,
        weight: float = 0.1,
        step_size: float = 0.05,
        barrier: float = 10.0,
        slack: float = 0.1,
        max_retries: int = 1,
    ) -> None:
        super().__init__()
        require(weight > 0, "bdistil", "weight", "positive", weight)
        require(0 < step_size <= 1, "bdistil", "step_size", "above 0 and at most 1", step_size)
        require(barrier > 0, "bdistil", "barrier", "positive", barrier)
        require(0 <= slack <= 1, "bdistil", "slack", "from 0 to 1", slack)
        require(
            isinstance(max_retries, int) and max_retries >= 0,
            "bdistil", "max_retries", "an integer of at least 0", max_retries,
        )  # fmt: skip
        self.weight = weight
        self.step_size = step_size
        self.barrier = barrier
        self.slack = slack
        self.max_retries = max_retries
        self.start(0, 0)

    def start(self, num_samples: int, num_classes: int) -> None:
        uniform = torch.full((num_samples, num_classes), 1 / max(num_samples, 1))
        self.register_buffer("k_plus", uniform)
        self.register_buffer("k_minus", uniform.clone())

    def loss(self, batch: Batch) -> Tensor:
        error = batch.student - batch.teacher
        k_plus, k_minus = self.k_plus[batch.index], self.k_minus[batch.index]
        lowest = torch.finfo(k_plus.dtype).tiny
        edges = edges_of(error, k_plus / k_plus.sum(0).clamp_min(lowest), k_minus / k_minus.sum(0).clamp_min(lowest))
        barrier = log_barrier(-(edges + self.slack), self.barrier).mean()
        return self.weight * (error.square().mean() + barrier)

    def finish_stage(self, student: Tensor, teacher: Tensor, stage: int) -> Verdict:
        edges = edges_of(student - teacher, self.k_plus, self.k_minus)
        worst = float(edges.min()) + 0.0  # no negative zero
        failing = int((~(edges >= -self.slack)).any(0).sum())  # nan fails, too
        passed = failing == 0
        return Verdict(
            passed=passed,
            metrics={"worst_edge": worst, "failing_classes": failing},
            message=f"weak learning condition {'holds' if passed else f'fails for {failing} classes'}: "
            f"smallest edge {worst:.3f}, allowed {0 - self.slack:g}",
        )

    def accept_stage(self, student: Tensor, teacher: Tensor, stage: int) -> None:
        step = self.step_size * (student - teacher)
        self.k_plus.copy_((self.k_plus.clamp_min(1e-38).log() - step).softmax(0))
        self.k_minus.copy_((self.k_minus.clamp_min(1e-38).log() + step).softmax(0))


def edges_of(error: Tensor, k_plus: Tensor, k_minus: Tensor) -> Tensor:
    """Edges e+ and e- of every class, (2, C), from the error f - g and the weights, (N, C) each."""
    scale = error.detach().abs().mean(0).clamp_min(torch.finfo(error.dtype).tiny)
    return torch.stack([(k_plus * error).sum(0), -(k_minus * error).sum(0)]) / scale


def log_barrier(z: Tensor, gamma: float) -> Tensor:
    """Log-barrier extension (arXiv 1904.04205, eq. 4) of the constraint z <= 0: -log(-z) / gamma, linear where -z is
    below 1 / gamma^2."""
    bound = 1 / gamma**2
    inside = -torch.log((-z).clamp_min(bound)) / gamma
    outside = gamma * z - math.log(bound) / gamma + 1 / gamma
    return torch.where(z < -bound, inside, outside)
