"""Mamba students s1 (smallest) to s7 (largest) for progressive distillation, in timm's dialect.

Paper: Mamba-PKD, https://arxiv.org/abs/2503.01727. Its architecture is not public; this one is ours: a
convolutional stem on the image's own grid (small images are meant, of 28 to 64 pixels), inverted residuals on half of
it, and bidirectional Mamba blocks (arXiv 2312.00752, 2401.09417) on the two coarser ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from timm_mamba_pkd.layers import Downsample, InvertedResidual, Mamba, MambaBlock
from timm_mamba_pkd.models.arguments import check_count, check_dtype, check_img_size, check_pool, check_rates
from timm_mamba_pkd.models.state_dict import classifier_names, fit_state_dict, require_architecture

__all__ = ["MambaPKD"]


@dataclass(frozen=True)
class StudentCfg:
    """Architecture of a student: width of the stem, widths and depths of the stages on 1/2, 1/4, 1/8 of the grid."""

    stem: int
    dims: tuple[int, int, int]
    depths: tuple[int, int, int]
    d_state: int = 4
    expand: float = 1.0


STUDENTS = {
    "mamba_pkd_s1": StudentCfg(stem=8, dims=(12, 20, 32), depths=(0, 1, 1)),
    "mamba_pkd_s2": StudentCfg(stem=8, dims=(16, 32, 54), depths=(1, 1, 2)),
    "mamba_pkd_s3": StudentCfg(stem=12, dims=(20, 44, 76), depths=(1, 2, 2)),
    "mamba_pkd_s4": StudentCfg(stem=16, dims=(32, 60, 120), depths=(1, 2, 2)),
    "mamba_pkd_s5": StudentCfg(stem=20, dims=(40, 72, 136), depths=(1, 3, 3)),
    "mamba_pkd_s6": StudentCfg(stem=20, dims=(48, 80, 152), depths=(2, 3, 3)),
    "mamba_pkd_s7": StudentCfg(stem=24, dims=(48, 96, 160), depths=(2, 4, 4)),
}


class Stem(nn.Module):
    """Convolution on the image's own grid: images (B, in_chans, H, W) in, (B, C, H, W) out."""

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 3, padding=1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[-2] >= 8, "images must be at least 8 pixels high")
        torch._assert(x.shape[-1] >= 8, "images must be at least 8 pixels wide")
        return self.act(self.norm(self.conv(x)))


class Stage(nn.Module):
    """Downsampling by 2 and blocks: (B, C, H, W) in, (B, C', ceil(H / 2), ceil(W / 2)) out.

    Inside, the layout is (B, H, W, C); outside it is what hooks of feature distillation expect.
    """

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x.permute(0, 2, 3, 1))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class MambaPKD(nn.Module):
    """A Mamba student for small images: (B, in_chans, H, W) in, logits (B, num_classes) out, for any H, W >= 8.

    Args:
        cfg: widths and depths.
        img_size: image size the model is made for, (height, width) or one number; other sizes work as well.
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate, device, dtype: timm's meanings.
        num_stages, final_norm: less of the network, what `prune_intermediate_layers` leaves. The norm follows the last
            of all stages only.

    Raises:
        ValueError: an argument is of a wrong type or out of its range.
    """

    def __init__(
        self,
        cfg: StudentCfg,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_stages: int = 3,
        final_norm: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        check_count("in_chans", in_chans, 1)
        check_count("num_classes", num_classes, 0)
        check_count("num_stages", num_stages, 1, len(cfg.dims))
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_pool(global_pool, num_classes)
        check_dtype(dtype)
        self.num_classes = num_classes
        self.adapts_classifier = False  # to the first weights, where num_classes was given
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.img_size = check_img_size(img_size)

        self.stem = Stem(in_chans, cfg.stem, **dd)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(cfg.depths), stagewise=True)
        self.stages: Any = nn.Sequential()
        self.feature_info: list[dict[str, Any]] = []
        in_dim = cfg.stem
        for i, (dim, stage_rates) in enumerate(list(zip(cfg.dims, rates, strict=True))[:num_stages]):
            blocks: list[nn.Module] = [
                MambaBlock(dim, cfg.d_state, cfg.expand, drop_path=rate, **dd)
                if i
                else InvertedResidual(dim, dim, drop_path=rate, **dd)
                for rate in stage_rates
            ]
            downsample = Downsample(in_dim, dim, **dd) if i else InvertedResidual(in_dim, dim, stride=2, **dd)
            self.stages.append(Stage(downsample, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 2 ** (i + 1), "module": f"stages.{i}"})
            in_dim = dim

        whole = num_stages == len(cfg.dims)
        self.norm = LayerNorm2d(in_dim, eps=1e-5, **dd) if final_norm and whole else nn.Identity()
        self.num_features = in_dim
        self._make_head(global_pool, **dd)
        self.init_weights()

    def _make_head(self, pool_type: str, device: Any, dtype: torch.dtype | None) -> None:
        self.head = ClassifierHead(
            self.num_features, self.num_classes, pool_type, self.drop_rate, device=device, dtype=dtype
        )
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def init_weights(self) -> None:
        """Reset every parameter and buffer, reproducibly from torch's seed."""
        for module in self.modules():
            if isinstance(module, (Mamba, nn.BatchNorm2d, nn.LayerNorm)):
                module.reset_parameters()
        mixers = {id(part) for module in self.modules() if isinstance(module, Mamba) for part in module.modules()}
        for module in self.modules():
            if id(module) in mixers:
                continue
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                module.weight.data.mul_(module.groups**0.5)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Set the image size the model is made for; every size from 8 up works, none changes a parameter."""
        self.img_size = check_img_size(img_size)
        self._traits = {**getattr(self, "_traits", {}), "img_size": self.img_size}  # which timm saves with a model

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay(self) -> set[str]:
        return {
            f"{path}.{name}"
            for path, module in self.named_modules()
            if isinstance(module, Mamba)
            for name in ("A_log", "D", "dt_proj.bias")
        }

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        check_count("num_classes", num_classes, 0)
        if global_pool is not None:
            check_pool(global_pool, num_classes)
        self.num_classes = num_classes
        like: Any = next(self.parameters())
        self._make_head(
            self.head.global_pool.pool_type if global_pool is None else global_pool, like.device, like.dtype
        )
        self.head.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the stages, as in timm: (final features, intermediates) or the intermediates only.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages to take: the last n if an int, all if None.
            norm: apply the norm, which is the head's otherwise, to the last stage's intermediate.
            stop_early: skip the stages after the last one taken.
            output_fmt: 'NCHW', the only one.
            intermediates_only: do not return the final features.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt}")
        take, last = feature_take_indices(len(self.stages), indices)
        final = len(self.stages) - 1
        if not stop_early:
            last = final
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if i <= last:
                x = stage(x)
            if i in take:
                intermediates.append(self.norm(x) if norm and i == final else x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages (and head) that the given intermediates do not need; returns the stages kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if shorter:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        # What timm makes the model of again from a folder of the hub.
        left = {"num_stages": last + 1, "final_norm": not isinstance(self.norm, nn.Identity)}
        self._model_args = {**getattr(self, "_model_args", {}), **left}
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Features of the last stage, (B, C, ceil(H / 8), ceil(W / 8)); the norm after it is part of the head."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x)
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; but where ``num_classes`` was given, the first weights may be of another class count.

        They then leave the classifier alone, with a warning; if not ``strict``, its keys are among the missing ones.

        Raises:
            RuntimeError: the state dict is of another architecture or class count; names the first keys that differ.
        """
        state_dict = fit_state_dict(self, state_dict, strict, self.adapts_classifier)
        keys = super().load_state_dict(state_dict, strict, assign)
        self.adapts_classifier = False
        return keys


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Native weights, bare or under torchdistill's ``model`` key; timm adapts their input channels and class count.

    Of the weights of an ensemble of s1 to s7, such as come with the package, a student takes its own.

    Raises:
        RuntimeError: they are of another architecture; names the first keys that differ.
    """
    state_dict = state_dict.get("model", state_dict)
    position = list(STUDENTS).index(model.pretrained_cfg["architecture"])  # pyright: ignore
    prefix = f"students.{position}."
    own = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    state_dict = own or state_dict
    require_architecture(model, state_dict, {"stem.conv.weight", *classifier_names(model)})
    return state_dict


def cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's default_cfg of a model made for 32x32 images."""
    return {
        "num_classes": 1000, "input_size": (3, 32, 32), "pool_size": (4, 4), "crop_pct": 1.0,
        "interpolation": "bilinear", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv", "classifier": "head.fc", "license": "mit", "min_input_size": (3, 8, 8),
        **kwargs,
    }  # fmt: skip


# Of each data set one file in the package has the weights of the whole ensemble, and so of each student. The first of
# these tags would be timm's default without the star.
TAGS: dict[str, dict[str, Any]] = {
    "mnist": {
        "file": str(Path(__file__).parents[1] / "weights" / "mnist.safetensors"),
        "num_classes": 10, "input_size": (1, 28, 28), "mean": (0.1307,), "std": (0.3081,),
    },
    "cifar10": {
        "file": str(Path(__file__).parents[1] / "weights" / "cifar10.safetensors"),
        "num_classes": 10, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
    },
    "untrained*": {},
}  # fmt: skip

default_cfgs = generate_default_cfgs(
    {f"{name}.{tag}": cfg(**traits) for name in STUDENTS for tag, traits in TAGS.items()}
)


def _create(variant: str, pretrained: bool, feature_cfg: dict[str, Any] | None = None, **kwargs: Any) -> MambaPKD:
    model: Any = build_model_with_cfg(
        MambaPKD,
        variant,
        pretrained,
        model_cfg=STUDENTS[variant],
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2), "flatten_sequential": True, **(feature_cfg or {})},
        **kwargs,
    )
    if isinstance(model, MambaPKD):  # no features_only wrapper
        model.adapts_classifier = "num_classes" in kwargs and not pretrained
        if "img_size" not in kwargs:
            pretrained_cfg: Any = model.pretrained_cfg
            model.set_input_size(pretrained_cfg["input_size"][1:])
    return model


@register_model
def mamba_pkd_s1(pretrained: bool = False, **kwargs: Any) -> MambaPKD:
    """Mamba student s1: at most 1.0 M multiply-accumulates on a 3x32x32 image."""
    return _create("mamba_pkd_s1", pretrained, **kwargs)


@register_model
def mamba_pkd_s2(pretrained: bool = False, **kwargs: Any) -> MambaPKD:
    """Mamba student s2: at most 2.5 M multiply-accumulates on a 3x32x32 image."""
    return _create("mamba_pkd_s2", pretrained, **kwargs)


@register_model
def mamba_pkd_s3(pretrained: bool = False, **kwargs: Any) -> MambaPKD:
    """Mamba student s3: at most 5.5 M multiply-accumulates on a 3x32x32 image."""
    return _create("mamba_pkd_s3", pretrained, **kwargs)


@register_model
def mamba_pkd_s4(pretrained: bool = False, **kwargs: Any) -> MambaPKD:
    """Mamba student s4: at most 10.9 M multiply-accumulates on a 3x32x32 image."""
    return _create("mamba_pkd_s4", pretrained, **kwargs)


@register_model
def mamba_pkd_s5(pretrained: bool = False, **kwargs: Any) -> MambaPKD:
    """Mamba student s5: at most 20 M multiply-accumulates on a 3x32x32 image."""
    return _create("mamba_pkd_s5", pretrained, **kwargs)


@register_model
def mamba_pkd_s6(pretrained: bool = False, **kwargs: Any) -> MambaPKD:
    """Mamba student s6: at most 28 M multiply-accumulates on a 3x32x32 image."""
    return _create("mamba_pkd_s6", pretrained, **kwargs)


@register_model
def mamba_pkd_s7(pretrained: bool = False, **kwargs: Any) -> MambaPKD:
    """Mamba student s7: at most 40.8 M multiply-accumulates on a 3x32x32 image."""
    return _create("mamba_pkd_s7", pretrained, **kwargs)
