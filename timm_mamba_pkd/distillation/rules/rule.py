"""What a progressive rule is: the one interface of this room."""

from abc import ABC, abstractmethod
from typing import Any


class Rule(ABC):
    """How stage k's student is related to the teacher and to the students before it.

    A rule adds terms to the loss of a stage, in torchdistill's own configuration language, beside the terms that the
    user's ``criterion`` has. Losses find the current student's logits under the path ``.``, the teacher's likewise,
    and, if ``sees_earlier``, the ensemble logits of the students before it under `EARLIER`.
    """

    EARLIER = "earlier"

    sees_earlier: bool = False

    @abstractmethod
    def loss_terms(self, stage: int) -> dict[str, dict[str, Any]]:
        """Terms for stage ``stage`` (1-based): name to ``{criterion: {key, kwargs}, weight}``."""
