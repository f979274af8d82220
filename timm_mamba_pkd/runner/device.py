"""The device that a command works on, and its precision."""

import torch

from timm_mamba_pkd.ops import resolve
from timm_mamba_pkd.runner.errors import ConfigError, first_line


def autocast(device: torch.device, amp: torch.dtype | None) -> torch.autocast:
    """The context of automatic mixed precision in the dtype ``amp``; None is full precision."""
    return torch.autocast(device.type, amp, enabled=amp is not None)


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
