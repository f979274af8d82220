import gzip
import os
import shutil
from pathlib import Path

import pytest
import torch

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
