"""The device that a command works on, and its precision."""

from typing import Any

import torch
from torch import nn

from timm_mamba_pkd.ops import resolve
from timm_mamba_pkd.runner.errors import ConfigError, first_line


def autocast(device: torch.device, amp: torch.dtype | None) -> torch.autocast:
    """The context of automatic mixed precision in the dtype ``amp``; None is full precision."""
    return torch.autocast(device.type, amp, enabled=amp is not None)


def keep_logits_in_float32(*models: nn.Module | None) -> None:
    """Have losses see float32 logits under autocast, as in timm and accelerate."""
    for model in models:
        if model is not None:
            model.register_forward_hook(lambda module, args, output: output.float())


def find_device(name: str | None) -> torch.device:
    """The device of a name, or CUDA where there is one, or else the CPU.

    Raises:
        ConfigError: it cannot be used, or the selective scan's backend that the environment asks for cannot.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name} cannot be used: {first_line(error)}") from error
    try:
        resolve("auto", device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return device


def name_of(device: torch.device) -> str:
    """Of a GPU; of the CPU, how many threads compute."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else threads(torch.get_num_threads())


def threads(count: int) -> str:
    return f"{count} CPU thread{'s' * (count != 1)}"


def precision(amp: bool, amp_dtype: str | None, by_config: torch.dtype | None = None) -> torch.dtype | None:
    """The dtype of automatic mixed precision that ``--amp``, ``--amp-dtype`` and a config ask for, if any.

    Raises:
        ConfigError: ``--amp-dtype`` without the others.
    """
    if amp_dtype is not None and not amp and by_config is None:
        raise ConfigError(f"--amp-dtype {amp_dtype} does nothing without --amp")
    if amp_dtype is not None:
        return getattr(torch, amp_dtype)
    return by_config or (torch.bfloat16 if amp else None)


def slows_down(amp: torch.dtype | None, device: torch.device) -> bool:
    """Whether ``amp`` is likely slower on ``device`` than float32: on an x86 CPU without instructions for it.

    Older versions of PyTorch do not tell what a CPU has; the answer is then no.
    """
    if amp is None or device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    has = torch.cpu.get_capabilities()
    fast = ("avx512_bf16", "amx_bf16") if amp == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return has.get("architecture") == "x86_64" and not any(has.get(each) for each in fast)


def precision_of_config(amp: Any) -> torch.dtype | None:
    """The dtype that ``amp`` under ``train`` in a config asks for, if any.

    Raises:
        ConfigError: it is none of what it can be.
    """
    if amp not in (None, False, True, "bfloat16", "float16"):
        message = f"train.amp must be True, False, bfloat16 or float16, got {amp!r}"
        raise ConfigError(message, at=("train", "amp"))
    return getattr(torch, amp if isinstance(amp, str) else "bfloat16") if amp else None
