"""A student with the feature maps of a ResNet: configs that hook a ResNet student run with ours in its place."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchdistill.models.registry import register_model

from timm_mamba_pkd.distillation.bridges import timm_model


@register_model(key="mamba_pkd_resnet_taps")
def resnet_taps(
    model_name: str,
    channels: Sequence[int] = (64, 128, 256, 512),
    reductions: Sequence[int] = (4, 8, 16, 32),
    **kwargs: Any,
) -> "ResNetTaps":
    """A timm model with ResNet's feature maps for a torchdistill YAML: ``key: mamba_pkd_resnet_taps``.

    Args:
        model_name: a student of ours, or any timm model with feature stages.
        channels: of ``layer1`` to ``layer4``: ResNet-18's and -34's; [256, 512, 1024, 2048] are those of ResNet-50.
        reductions: how many times smaller than the image their grids are; [1, 2, 4, 8] where the teacher has
            ``small_stem``.
        **kwargs: passed to ``timm.create_model``.
    """
    return ResNetTaps(timm_model(model_name, **kwargs), channels, reductions)


class ResNetTaps(nn.Module):
    """A student under the module names and with the shapes of a ResNet's features, for losses that hook them.

    For images (B, C, H, W) in training mode, ``layer1`` to ``layer4`` give (B, channels[i], ceil(H / reductions[i]),
    ceil(W / reductions[i])), ``avgpool`` gives (B, channels[3], 1, 1), and ``fc`` takes (B, channels[3]) and gives
    the logits. Each layer is a regressor of the student's nearest stage, as in FitNets (arXiv 1412.6550): pooling to
    the grid and a 1x1 convolution, trained along with the student.

    The logits are the student's own. In eval mode no tap runs, and the state dict is the student's: the taps' weights
    are not saved, and a checkpoint loads into the bare student.

    A tap that no loss hooks gets no gradient: DistributedDataParallel needs ``find_unused_parameters=True``.

    Args:
        student: a timm model with ``feature_info`` and ``forward_intermediates``.
        channels, reductions: of ``layer1`` to ``layer4``.
    """

    def __init__(
        self,
        student: nn.Module,
        channels: Sequence[int] = (64, 128, 256, 512),
        reductions: Sequence[int] = (4, 8, 16, 32),
    ) -> None:
        super().__init__()
        for name, values in (("channels", channels), ("reductions", reductions)):
            if len(values) != 4 or not all(isinstance(value, int) and value > 0 for value in values):
                raise ValueError(f"{name} must be four positive integers, for layer1 to layer4, got {values!r}")
        features: Any = getattr(student, "feature_info", None)
        if not features or not hasattr(student, "forward_intermediates"):
            raise ValueError(f"{type(student).__name__} has no feature stages to tap (timm's forward_intermediates)")
        self.student: Any = student
        self.sources = [_nearest_stage(features, reduction) for reduction in reductions]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            Tap(features[source]["num_chs"], dim, reduction)
            for source, dim, reduction in zip(self.sources, channels, reductions, strict=True)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = Classifier()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.student(x)
        wanted = sorted(set(self.sources))
        final, features = self.student.forward_intermediates(x, indices=wanted)
        size: Any = x.shape[-2:]
        layer1, layer2, layer3, layer4 = (features[wanted.index(source)] for source in self.sources)
        self.layer1(layer1, size)
        self.layer2(layer2, size)
        self.layer3(layer3, size)
        pooled = self.avgpool(self.layer4(layer4, size))
        return self.fc(pooled.flatten(1), logits=self.student.forward_head(final))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.student.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.student.load_state_dict(state_dict, strict, assign)


class Tap(nn.Module):
    """A stage's features (B, in_dim, h, w), pooled to a grid of ceil(image size / reduction): (B, dim, h', w')."""

    def __init__(self, in_dim: int, dim: int, reduction: int) -> None:
        super().__init__()
        self.reduction = reduction
        self.proj = nn.Conv2d(in_dim, dim, 1)

    def forward(self, x: Tensor, image_size: tuple[int, int]) -> Tensor:
        height, width = (-(-side // self.reduction) for side in image_size)
        return self.proj(F.adaptive_avg_pool2d(x, (height, width)))


class Classifier(nn.Module):
    """Where a ResNet turns pooled features (B, C) into logits; here the logits come from the student."""

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return logits


def _nearest_stage(features: Sequence[dict[str, Any]], reduction: int) -> int:
    """The deepest stage whose grid is at least as fine as asked for; the first one if none is."""
    return max((i for i, stage in enumerate(features) if stage["reduction"] <= reduction), default=0)
