import gzip
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from timm_mamba_pkd.ops import BACKENDS, native

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TIMM_MAMBA_PKD_DATA", ROOT / "resource" / "dataset"))
SHARED = ROOT.parent / "shared" / "data"

# The tests' models are tiny: more threads cost more than they bring.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """The folder to give to ``torchvision.datasets.MNIST``."""
    if (DATA / "MNIST" / "raw").is_dir():
        return DATA
    archives = sorted((SHARED / "MNIST" / "raw").glob("*.gz"))
    if not archives:
        pytest.skip(f"no MNIST in {DATA}: set TIMM_MAMBA_PKD_DATA to the folder that holds MNIST/raw")
    root = tmp_path_factory.mktemp("data")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in archives:
        with gzip.open(archive) as packed, open(raw / archive.stem, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return root


@pytest.fixture(scope="session")
def cifar10_jpeg(tmp_path_factory) -> Path:
    """A folder that holds test/, CIFAR-10's test images as JPEG files in a folder per class."""
    folder, archive = DATA / "cifar10-jpeg", SHARED / "cifar10-jpeg.tar.xz"
    if folder.is_dir():
        return folder
    if not archive.is_file():
        pytest.skip(f"no cifar10-jpeg in {DATA}: set TIMM_MAMBA_PKD_DATA to the folder that holds it")
    folder = tmp_path_factory.mktemp("cifar10-jpeg")
    with tarfile.open(archive) as packed:
        members = [member for member in packed if member.name.removeprefix("./").startswith("test/")]
        packed.extractall(folder, members, filter="data")
    return folder


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
