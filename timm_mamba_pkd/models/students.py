"""Some students of an ensemble as one classifier."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from timm_mamba_pkd.models.combination import combine
from timm_mamba_pkd.models.reuse import Reuse, run_students


class Students(nn.Module):
    """Some students of an ensemble as one classifier: images (B, in_chans, H, W) in, logits (B, num_classes) out.

    Their logits are combined as the ensemble combines its first ones, those of a single student are as they are.
    """

    weights: Tensor | None

    def __init__(self, ensemble: Any, positions: Sequence[int]) -> None:
        super().__init__()
        count = positions[-1] + 1
        connections = ensemble.connections()[:count]
        needed = set(positions)
        for i in reversed(range(count)):
            if i in needed and connections[i] is not None:
                needed.update(range(i - connections[i].num_sources, i))
        self.positions = tuple(positions)
        self.students: Any = nn.ModuleList(
            own if i in needed else nn.Identity() for i, own in enumerate(ensemble.students[:count])
        )
        self.reuse = nn.ModuleList(
            own if own is not None and i in needed else nn.Identity() for i, own in enumerate(connections)
        )
        self.register_buffer("weights", ensemble.weights if len(self.positions) == count else None)
        self.training = ensemble.training

    def forward(self, x: Tensor) -> Tensor:
        connections = [own if isinstance(own, Reuse) else None for own in self.reuse]
        logits = list(run_students(self.students, connections, x, self.positions))
        return combine(logits, self.weights)[-1]
