import gzip
import os
import shutil
from pathlib import Path

import pytest
import torch

from timm_mamba_pkd.ops import BACKENDS, native

ROOT = Path(__file__).resolve().parents[1]

# The tests' models are tiny: more threads cost more than they bring.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """The folder to give to ``torchvision.datasets.MNIST``."""
    root = Path(os.environ.get("TIMM_MAMBA_PKD_DATA", ROOT / "resource" / "dataset"))
    if (root / "MNIST" / "raw").is_dir():
        return root
    archives = sorted((ROOT.parent / "shared" / "data" / "MNIST" / "raw").glob("*.gz"))
    if not archives:
        pytest.skip(f"no MNIST in {root}: set TIMM_MAMBA_PKD_DATA to the folder that holds MNIST/raw")
    root = tmp_path_factory.mktemp("data")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in archives:
        with gzip.open(archive) as packed, open(raw / archive.stem, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return root


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
