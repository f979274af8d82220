"""Multiply-accumulates of a model."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from timm_mamba_pkd.layers import Mamba


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Count the multiply-accumulates of one image through `model` in eval mode.

    One multiply-accumulate (MAC) is two of the FLOPs that `torch.utils.flop_counter.FlopCounterMode` counts. It counts
    convolutions, matrix products, attention and every operator with a registered formula, which the selective scan of
    `timm_mamba_pkd.ops` is; a mixer made in timm's exportable mode counts as any other. It ignores elementwise work,
    normalisation, pooling, and operators without a formula such as LSTMs.

    The count is made on a copy without hooks: on the meta device, or where the model cannot run there (it looks at the
    values of its tensors) on its own device with a blank image. `model` itself never runs and is left as it was.

    Args:
        model: takes a float tensor (1, C, H, W) in the dtype of its parameters.
        input_size: (C, H, W).

    Raises:
        ValueError: the model runs neither on the meta device nor on its own. The message has both reasons.
    """
    reasons = []
    for device in (torch.device("meta"), _device_of(model)):
        try:
            return _count_macs_on(model, input_size, device)
        except Exception as error:  # whatever a user's model raises, reported below unless the other device serves
            reasons.append(f"on {device}: {type(error).__name__}: {error}")
    raise ValueError(
        f"cannot count the MACs of {type(model).__name__}: it does not run on an input of {(1, *input_size)}.\n"
        + "\n".join(reasons)
    )


def _count_macs_on(model: nn.Module, input_size: tuple[int, int, int], device: torch.device) -> int:
    runner = copy_for_eval(model, device)
    for module in runner.modules():
        if isinstance(module, Mamba) and module.backend == "exportable":
            module.backend = "auto"
    image = blank_image(model, input_size, device)
    fused_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention's one operator on CPU has no FLOP formula
    try:
        # Not every torch has a formula for the CPU's fused attention; plain matrix products count the same.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            runner(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_attention)
    return counter.get_total_flops() // 2


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def blank_image(model: nn.Module, input_size: tuple[int, int, int], device: torch.device) -> Tensor:
    """Zeros (1, C, H, W) on ``device`` in the dtype of `model`'s parameters."""
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return torch.zeros(1, *input_size, device=device, dtype=next(dtypes, torch.get_default_dtype()))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def copy_for_eval(model: nn.Module, device: torch.device) -> nn.Module:
    """Copy `model` to `device` in eval mode, without its hooks, sharing the parameters that are there already.

    Hooks stay behind because they write elsewhere (a distillation box's records of features) and because what they
    hold need not be copyable.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to(device), requires_grad=False)
        for parameter in model.parameters()
    }
    for module in model.modules():
        memo.update({id(getattr(module, name)): OrderedDict() for name in _HOOKS})
    with _TensorsCopiedTo(device):
        return copy.deepcopy(model, memo).eval()


class _TensorsCopiedTo(TorchFunctionMode):
    """Makes `copy.deepcopy` put tensors on a device, also those inside an autograd graph, which it refuses."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().to(self.device, copy=True)
        return memo[id(tensor)]
