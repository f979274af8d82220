"""Reading and writing of model weights: safetensors out; safetensors or ``weights_only`` torch files in."""

import argparse
import io
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.models import clean_state_dict
from torch import Tensor, nn

from timm_mamba_pkd.files import write_file
from timm_mamba_pkd.models.adaptation import adapted
from timm_mamba_pkd.models.ensemble import MambaPKDEnsemble
from timm_mamba_pkd.models.state_dict import differences, not_finite

_logger = logging.getLogger(__name__)

AVERAGED = ("state_dict_ema", "model_ema")
FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class WeightsError(ValueError):
    """A weights file that is missing, damaged, or made for another model."""


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write ``model``'s state dict as safetensors, atomically: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, weights_file_of(model))


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Write ``{"model": state_dict}`` as torch file, atomically: what torchdistill's ``load_ckpt`` reads."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, checkpoint_file_of(model))


def weights_file_of(model: nn.Module) -> bytes:
    """What `save_weights` writes."""
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    return save(state, metadata={"format": "pt"})


def checkpoint_file_of(model: nn.Module) -> memoryview:
    """What `save_checkpoint` writes."""
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict()}, buffer)
    return buffer.getbuffer()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file or a torch file; nothing in the file is executed.

    Torch files may hold the state dict itself or carry it as timm or torchdistill do, and are read in timm's order:
    under ``state_dict_ema`` or ``model_ema``, which is logged, then ``state_dict``, then ``model``. What DDP and
    ``torch.compile`` put before the names is taken off.

    Raises:
        WeightsError: the file is missing, damaged, or holds no state dict.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(f"weights file {path} {'is a directory' if path.is_dir() else 'does not exist'}")
    try:
        if path.suffix == ".safetensors":
            return clean_state_dict(load_file(path))
        # torchdistill's checkpoints carry the command line's Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "weights_only" in reason:  # TorchScript, with torch's advice to load it unsafely
            raise WeightsError(f"weights file {path} is not a plain state dict and was not loaded") from error
        raise WeightsError(f"weights file {path} cannot be read: {reason}") from error
    except Exception as error:  # pickle.UnpicklingError and whatever a hostile pickle provokes
        raise WeightsError(f"weights file {path} is not a plain state dict and was not loaded") from error
    for key in (*AVERAGED, "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            if key in AVERAGED:
                _logger.warning("The weights taken from %s are the averaged ones (%s)", path, key)
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise WeightsError(f"weights file {path} holds no state dict (expected tensors by name, or 'model': tensors)")
    odd = next((name for name, tensor in content.items() if not _is_plain(tensor)), None)
    if odd is not None:
        raise WeightsError(
            f"weights file {path} holds {odd} as a sparse, quantized, complex or empty shell of a tensor"
        )
    return clean_state_dict(dict(content))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_complex())


@contextmanager
def tensors_only() -> Iterator[None]:
    """In this context `torch.load` builds tensors and plain values only, whoever calls it, and whatever it asks for.

    It is PyTorch's own switch, for what torchvision, torchdistill and data sets load, worker processes included.
    """
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights at ``path`` into ``model``, all of them or none.

    Raises:
        WeightsError: as `read_weights`, or the file belongs to another architecture or class count, or holds NaN or
            infinity; the message names the first keys concerned.
    """
    load_state(model, read_weights(path), path)


def load_state(model: nn.Module, found: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict, which `read_weights` found at ``path``, as `load_weights` does."""
    if broken := not_finite(found):
        raise WeightsError(f"weights file {path} holds values that are not finite: {broken}")
    complete = adapted(model, found) if isinstance(model, MambaPKDEnsemble) else nullcontext(found)
    try:
        with complete as found:
            if different := differences(found, model.state_dict()):
                raise RuntimeError(different)
    except RuntimeError as error:
        raise WeightsError(f"weights file {path} is of another model than {type(model).__name__}: {error}") from error
    model.load_state_dict(found)
