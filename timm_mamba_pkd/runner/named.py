"""Models by their name in timm."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import (
    get_model_input_config,
    is_model,
    is_model_in_modules,
    is_model_pretrained,
    resolve_model_input_args,
    split_model_name_tag,
)
from torch import nn

from timm_mamba_pkd.distillation import unknown_name
from timm_mamba_pkd.runner.errors import ConfigError, explain, first_line

NOT_BY_KWARGS = {
    "num_classes": "has a flag of its own: --num-classes",
    "in_chans": "has a flag of its own: --in-chans",
    "img_size": "has a flag of its own: --img-size",
    "checkpoint_path": "has a flag of its own: --checkpoint",
    "pretrained": "is what a tag stands for: name the model by one, as in mamba_pkd_s1.mnist, or name a --checkpoint",
    "features_only": "makes no classifier: leave it out",
}
OURS = ("mamba_pkd", "ensemble")  # modules in timm's registry


def brings_weights(name: str) -> bool:
    """Whether a name stands for weights: timm's ``local-dir:FOLDER`` or ``hf-hub:REPO``, or a tag that has some."""
    return ":" in name or (bool(split_model_name_tag(name)[1]) and is_model_pretrained(name))


def create_named(
    name: str,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    exportable: bool = False,
    try_it: bool = True,
    weights: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, tuple[int, int, int]]:
    """Create a model of timm in eval mode, and try it on one image.

    Args:
        name: a name in timm's registry, or timm's ``local-dir:FOLDER`` or ``hf-hub:REPO``.
        num_classes, in_chans, img_size: those of the model or of its weights if None.
        exportable: make it in timm's exportable mode.
        try_it: whether to try it on an image.
        weights: whether a tag brings its weights along; a folder always does.
        model_kwargs: ``--model-kwargs``, more of ``timm.create_model``'s.

    Returns:
        the model, and the size (C, H, W) of its images.

    Raises:
        ConfigError: no such model, or it cannot be of these sizes, or ``model_kwargs`` hold one of them, or weights.
    """
    model_kwargs = model_kwargs or {}
    for key, advice in NOT_BY_KWARGS.items():
        if key in model_kwargs:
            raise ConfigError(f"--model-kwargs {key} {advice}")
    if ":" not in name and not is_model(name):
        raise ConfigError(unknown_name("model", name, timm.list_models()))
    try:
        size = {"img_size": img_size}
        kwargs = resolve_model_input_args(name, size, num_classes=num_classes, in_chans=in_chans, **model_kwargs)
        if img_size is not None and is_model_in_modules(kwargs["model_name"], OURS):
            kwargs["img_size"] = img_size
        pretrained = ":" in name or (weights and brings_weights(name))
        model: Any = timm.create_model(pretrained=pretrained, exportable=exportable, **kwargs).eval()
    except Exception as error:  # whatever a model's constructor, or a folder that is none, raises
        raise ConfigError(f"model {name} cannot be created: {explain(error)}") from error
    channels, *own = get_model_input_config(model)["input_size"]
    height, width = own if img_size is None else (img_size, img_size) if isinstance(img_size, int) else img_size
    if try_it:
        try_image(model, name, (channels, height, width))
    return model, (channels, height, width)


def try_image(model: nn.Module, name: str, input_size: tuple[int, int, int]) -> int:
    """The number of outputs of ``model``, in eval mode, or a ConfigError if it cannot take images of ``input_size``."""
    try:
        with torch.inference_mode():
            return model(torch.zeros(1, *input_size)).shape[-1]
    except Exception as error:  # whatever a model's forward raises
        shape = "x".join(map(str, input_size))
        raise ConfigError(f"model {name} cannot take images of {shape}: {first_line(error)}") from error
