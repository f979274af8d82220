"""Bridges from torchdistill's registries to timm: models and optimizers by their timm names."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import Muon
from torch import nn
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import MODEL_DICT, get_model, register_model
from torchdistill.optim.registry import register_optimizer

from timm_mamba_pkd.models.weights import load_weights


@register_model(key="mamba_pkd_timm_model")
def timm_model(model_name: str, small_stem: bool = False, **kwargs: Any) -> nn.Module:
    """Any timm model for a torchdistill YAML: ``key: mamba_pkd_timm_model``, ``kwargs: {model_name: resnet18, ...}``.

    A key of its own is needed because torchdistill looks names up in torchvision first.

    Args:
        model_name: name in timm's registry.
        small_stem: replace a ResNet's 7x7 stride-2 stem and max-pool by a 3x3 stride-1 convolution, the usual stem
            for images of 64 pixels or less.
        **kwargs: passed to ``timm.create_model``.
    """
    if not timm.is_model(model_name):
        raise ValueError(unknown_name("timm model", model_name, timm.list_models()))
    model = timm.create_model(model_name, **kwargs)
    if small_stem:
        conv = getattr(model, "conv1", None)
        if not isinstance(conv, nn.Conv2d) or not hasattr(model, "maxpool"):
            raise ValueError(f"small_stem needs a timm ResNet with a single stem convolution, not {model_name}")
        model.conv1 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


@register_optimizer(key="mamba_pkd_adamw")
def adamw_without_state_space_decay(
    params: Iterable[nn.Parameter], lr: float = 1e-3, weight_decay: float = 0.05, **kwargs: Any
) -> torch.optim.AdamW:
    """AdamW that decays matrices only: no vectors (biases, norms) and no state space parameters (A_log, D, dt bias).

    It is timm's rule for weight decay, for torchdistill, which hands optimizers nameless parameters. PyTorch's fused
    implementation runs unless ``fused``, ``foreach`` or ``differentiable`` says otherwise.
    """
    kwargs.setdefault("fused", not (kwargs.get("foreach") or kwargs.get("differentiable")))
    matrices, rest = _by_decay(params)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, **kwargs)


@register_optimizer(key="mamba_pkd_muon")
def muon_for_matrices(
    params: Iterable[nn.Parameter], lr: float = 0.008, weight_decay: float = 0.05, **kwargs: Any
) -> Muon:
    """timm's Muon (https://kellerjordan.github.io/posts/muon): orthogonalized updates, weight decay on matrices only.

    What has no matrix to orthogonalize gets AdamW's updates, at ``lr * fallback_lr_scale``: vectors, depthwise
    convolutions, state space parameters and what timm finds too narrow, such as matrices with a side below 4. The
    parameters without weight decay are those of ``mamba_pkd_adamw``.

    Args:
        params, lr, weight_decay: torch's meanings; ``lr`` is scaled so that an update is about as large as AdamW's.
        **kwargs: passed to ``timm.optim.Muon``: ``nesterov``, ``betas``, ``fallback_lr_scale``, ...
    """
    matrices, rest = _by_decay(params)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0, "use_fallback": True},
    ]
    return Muon([group for group in groups if group["params"]], lr=lr, **kwargs)


def _by_decay(params: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters with weight decay and those without."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for p in params:
        (rest if p.ndim <= 1 or getattr(p, "_no_weight_decay", False) else matrices).append(p)
    return matrices, rest


def build_model(config: dict[str, Any]) -> nn.Module:
    """Build a model from its entry in a torchdistill config (``key``, ``kwargs``, ``src_ckpt``).

    Raises:
        ValueError: the key is unknown, the arguments do not fit, or ``src_ckpt`` is missing or of another model.
    """
    key, kwargs, repo = config["key"], config.get("kwargs") or {}, config.get("repo_or_dir")
    try:
        model: Any = get_image_classification_model({**config, "kwargs": kwargs})
        if model is None:
            if repo is None and key not in MODEL_DICT:
                raise ValueError(unknown_name("model", key, MODEL_DICT))
            model = get_model(key, repo, **kwargs)
    except TypeError as error:
        raise ValueError(f"model {key} does not take these kwargs: {error}") from error
    if config.get("src_ckpt") is not None:
        load_weights(model, weights_file(config["src_ckpt"]))
    return model


def weights_file(source: str | Path) -> Path:
    """The file of a ``src_ckpt``, which may be a URL: it is then downloaded to where torch.hub keeps checkpoints."""
    if not str(source).startswith(("http://", "https://")):
        return Path(source)
    path = Path(torch.hub.get_dir()) / "checkpoints" / str(source).rsplit("/", 1)[-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        torch.hub.download_url_to_file(str(source), str(path))
    return path


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """One line that says ``name`` is unknown and which known names are nearest (all, when they are few)."""
    known = sorted(known)
    near = known if len(known) <= 12 else difflib.get_close_matches(str(name), known, n=5, cutoff=0.5)
    return f"unknown {what} '{name}'" + (f"; known: {', '.join(near)}" if near else "")
