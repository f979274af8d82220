"""What a state dict brings along that an ensemble may lack: a combination's weights, connections, a policy."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from timm_mamba_pkd.models.combination import uniform_weights
from timm_mamba_pkd.models.policies import Confidence

_logger = logging.getLogger(__name__)


def adapt_to(ensemble: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Have an ensemble take on the combination, the connections and the policy that a state dict brings along.

    Returns:
        what the state dict lacks because it is of a mean: the weights of the mean, if the ensemble has weights.

    Raises:
        RuntimeError: the policy is damaged or for another number of students.
    """
    weights = state_dict.get("weights")
    if weights is not None and (ensemble.weights is None or ensemble.weights.ndim != weights.ndim):
        before, ensemble.policy = ensemble.combination, None
        ensemble.set_combination("per_student" if weights.ndim == 2 else "per_class")
        _logger.info("The weights combine the students %s instead of by %s", ensemble.combination, before)
    for name, tensor in state_dict.items():
        match = re.fullmatch(r"reuse\.(\d+)\.projections\.0\.weight", name)
        if match and tensor.ndim == 4 and int(match[1]) < len(ensemble.students):
            _connect_like(ensemble, int(match[1]), tensor.shape[1])
    ensemble.policy = _policy(ensemble, state_dict)
    if weights is not None or ensemble.weights is None:
        return {}
    mean = uniform_weights(len(ensemble.students), ensemble.num_classes, ensemble.combination, ensemble.active.device)
    assert mean is not None
    return {"weights": mean}


@contextmanager
def adapted(ensemble: Any, state_dict: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The state dict as `adapt_to` completes it; where the context ends by an error the ensemble is as before."""
    before = dict(ensemble.reuse.items()), ensemble.weights, ensemble.policy
    try:
        yield {**state_dict, **adapt_to(ensemble, state_dict)}
    except Exception:
        ensemble.reuse, ensemble.weights, ensemble.policy = nn.ModuleDict(before[0]), *before[1:]
        raise


def _policy(ensemble: Any, state_dict: Mapping[str, Tensor]) -> Confidence | None:
    found = {name: tensor for name, tensor in state_dict.items() if name.startswith("policy.")}
    if not found:
        return None
    try:
        policy = Confidence.from_state_dict(found, "policy.")
    except ValueError as error:
        raise RuntimeError(f"the state dict's policy is damaged: {error}") from error
    if len(policy.temperatures) != len(ensemble.students):
        raise RuntimeError(
            f"the state dict's policy is for {len(policy.temperatures)} students, this ensemble has "
            f"{len(ensemble.students)}"
        )
    return policy


def _connect_like(ensemble: Any, position: int, width: int) -> None:
    """Connect the student at ``position`` to as many earlier ones as give ``width`` channels in the first stage."""
    own = ensemble.connections()[position]
    for count in range(1, position + 1):
        sources = ensemble.students[position - count : position]
        if (
            ensemble.can_connect(position, count)
            and sum(model.feature_info[0]["num_chs"] for model in sources) == width
            and (own is None or own.num_sources != count)  # its parameters may be in training
        ):
            ensemble.connect(position, count)
