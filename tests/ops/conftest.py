import pytest
import torch

from timm_mamba_pkd.ops import BACKENDS, native


@pytest.fixture
def backend(request, monkeypatch) -> str:
    """The name of a backend; "native: AVX2" is the native one on that instruction set."""
    name, _, instruction_set = request.param.partition(": ")
    if name in BACKENDS and (reason := BACKENDS[name].unavailable(torch.device("cpu"))):
        pytest.skip(reason)
    if instruction_set:
        index = native.INSTRUCTION_SETS.index(instruction_set)
        if index > native.instruction_set():
            pytest.skip(f"this processor has no {instruction_set}")
        monkeypatch.setattr(native, "instruction_set", lambda: index)
    return name
