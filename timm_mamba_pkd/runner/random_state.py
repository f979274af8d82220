"""The state of every random generator that a training step can draw from, as plain data."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

RandomState = dict[str, Any]


def random_state(generators: Sequence[torch.Generator] = ()) -> RandomState:
    """The states of torch's (CPU and every GPU), NumPy's and Python's generators, and of the ``generators`` given."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": list(random.getstate()),
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: RandomState, generators: Sequence[torch.Generator] = ()) -> None:
    """Put the generators into the states of `random_state`; those of GPUs that are not here are passed over."""
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    for generator, own in zip(generators, state["generators"], strict=False):
        generator.set_state(own)
