"""Whether a state dict fits a model, said in one line where it does not; and what tells models apart."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The first names, shapes and kinds of dtype in which ``found`` differs from ``wanted``; empty if there are none.

    Floating point numbers may be of another precision.
    """
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [str(name) for name in found if name not in wanted],
        "shape of": [
            f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in found and found[name].shape != tensor.shape
        ],
        "dtype of": [
            f"{name} {found[name].dtype} instead of {tensor.dtype}"
            for name, tensor in wanted.items()
            if name in found and found[name].is_floating_point() != tensor.is_floating_point()
        ],
    }
    return "; ".join(
        f"{kind} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" for kind, names in kinds.items() if names
    )


def fingerprint(model: nn.Module, text: str = "") -> str:
    """SHA-256 of a text and a model's weights."""
    digest = hashlib.sha256(text.encode())
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def not_finite(state_dict: Mapping[str, Tensor]) -> str:
    """The first names of tensors that hold NaN or infinity; empty if there are none."""
    names = [name for name, tensor in state_dict.items() if not tensor.isfinite().all()]
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def require_architecture(model: Any, found: Mapping[str, Tensor], apart_from: set[str]) -> None:
    """Raise a RuntimeError that names the first keys in which a state dict differs from ``model``'s, but for some."""
    different = differences(_without(apart_from, found), _without(apart_from, model.state_dict()))
    if different:
        raise RuntimeError(f"the weights are of another architecture than this {type(model).__name__}: {different}")


def fit_state_dict(
    model: Any, found: Mapping[str, Tensor], strict: bool = True, new_classifier: bool = False
) -> Mapping[str, Tensor]:
    """What ``model`` is to load of a state dict: all of it, or its features only.

    Args:
        model: with timm's ``get_classifier``, ``num_classes`` and ``in_chans``.
        found: the state dict.
        strict: as in ``load_state_dict``: no name may be missing or unexpected.
        new_classifier: where only the class count differs, the model keeps its own classifier; a warning says so. If
            not ``strict``, it is then missing from what is returned.

    Raises:
        RuntimeError: as ``load_state_dict``: the names, shapes or dtypes differ; the message has the first ones.
    """
    wanted = model.state_dict()
    compared = found if strict else wanted | {name: tensor for name, tensor in found.items() if name in wanted}
    different = differences(compared, wanted)
    if not different:
        return found
    names = classifier_names(model)
    classifier = {name: tensor for name, tensor in wanted.items() if name in names}
    fits_otherwise = not differences(_without(names, compared) | classifier, wanted)
    other_count = fits_otherwise and _of_another_count(classifier, found, names)
    if other_count and new_classifier:
        _logger.warning("The classifier starts anew, the state dict is of another class count: %s", different)
        return _without(names, found) | (classifier if strict else {})
    own = f"{type(model).__name__} with num_classes={model.num_classes}, in_chans={model.in_chans}"
    advice = " (create the model with the state dict's num_classes)" if other_count else ""
    raise RuntimeError(f"the state dict is of another model than this {own}: {different}{advice}")


def _of_another_count(own: Mapping[str, Tensor], found: Mapping[str, Tensor], names: set[str]) -> bool:
    """Whether whole classifiers differ in their class count alone, or the model is to have none."""
    theirs = {name: found[name] for name in names if name in found}
    if not own:
        return True
    return own.keys() == theirs.keys() and all(
        theirs[name].shape[0] != tensor.shape[0] and theirs[name].shape[1:] == tensor.shape[1:]
        for name, tensor in own.items()
    )


def classifier_names(model: Any) -> set[str]:
    """The names of the parameters that the model's classifiers have, or would have if it had classes."""
    classifiers = set(model.get_classifier().modules())
    modules = [name for name, module in model.named_modules() if module in classifiers]
    return {f"{name}.{parameter}" for name in modules for parameter in ("weight", "bias")}


def _without(names: set[str], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if name not in names}
