"""The native scan beyond the contract: threads, memory, instruction sets, and what happens without its library."""

import logging
import os
import platform
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from timm_mamba_pkd.ops import BACKENDS, native, selective_scan
from timm_mamba_pkd.ops.backends import VARIABLE, _automatic

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "timm_mamba_pkd" / "ops" / "csrc"
CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(native.unavailable(CPU) is not None, reason=str(native.unavailable(CPU)))


def make_inputs(batch: int, channels: int, length: int, states: int) -> list[Any]:
    """u, delta, A, B, C, D, z, delta_bias; channels-last as the mixer's."""
    torch.manual_seed(length)
    rows = [torch.randn(batch, length, n).transpose(1, 2) for n in (channels, channels, states, states, channels)]
    u, delta, B, C, z = rows
    return [u, delta, -torch.rand(channels, states) - 0.1, B, C, torch.randn(channels), z, torch.randn(channels)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: "the native library was not built")
    _automatic.cache_clear()
    yield
    _automatic.cache_clear()


@needs_library
@pytest.mark.parametrize("batch", [1, 2, 3, 9])
def test_threads_share_the_batch_and_the_channels(batch, threads):
    """With few images the channels are split, too, and B's and C's gradients are summed over the parts."""
    tensors = [tensor.requires_grad_() for tensor in make_inputs(batch, channels=50, length=19, states=3)]
    results = []
    for number in (1, 2, 4):
        threads(number)
        y = selective_scan(*tensors, delta_softplus=True, backend="native")
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for other in results[1:]:
        for one, many in zip(results[0], other, strict=True):
            torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-5 * one.abs().max().item())


@needs_library
def test_two_runs_agree_bit_for_bit(threads):
    threads(2)
    tensors = [tensor.requires_grad_() for tensor in make_inputs(7, channels=40, length=49, states=16)]
    runs = []
    for _ in range(2):
        y = selective_scan(*tensors, delta_softplus=True, backend="native")
        runs.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@needs_library
def test_nothing_is_saved_without_grad():
    u, delta, A, B, C, *_ = make_inputs(2, channels=5, length=19, states=3)
    arguments = (u, delta, A, B, C, None, None, None, True, False)
    op = torch.ops.timm_mamba_pkd
    assert op.selective_scan(*arguments, False, "native")[1].numel() == 0
    saved = op.selective_scan(*arguments, True, "native")[1]
    assert list(saved.shape) == native.saved_shape(u, A) == [2, 3, 16, 3]
    dy = torch.randn_like(u)
    with_saved = op.selective_scan_backward(dy, saved, *arguments, "native")
    without = op.selective_scan_backward(dy, saved[:0], *arguments, "native")
    assert all(torch.equal(first, second) for first, second in zip(with_saved, without, strict=True))


@needs_library
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_spoils_its_own_sequence_only(bad):
    tensors = make_inputs(3, channels=20, length=19, states=5)
    good = selective_scan(*tensors, delta_softplus=True, backend="native")
    tensors[1][1, 7, 4] = bad
    y = selective_scan(*tensors, delta_softplus=True, backend="native")
    true = selective_scan(*tensors, delta_softplus=True, backend="reference")
    assert torch.equal(y.isfinite(), true.isfinite())
    assert not y[1, 7, 4:].isfinite().any()
    same = torch.ones(3, 20, 19, dtype=torch.bool)
    same[1, 7, 4:] = False
    assert torch.equal(y[same], good[same])


@needs_library
def test_negated_views():
    tensors = make_inputs(2, channels=3, length=5, states=2)
    negated = torch.complex(torch.zeros_like(tensors[0]), tensors[0]).conj().imag
    assert negated.is_neg()
    y = selective_scan(negated, *tensors[1:], backend="native")
    torch.testing.assert_close(y, selective_scan(-tensors[0], *tensors[1:], backend="native"), rtol=0, atol=0)


@needs_library
def test_in_a_forked_worker(threads):
    """OpenMP's threads do not survive a fork: a data loader's worker has one thread and must not wait for more."""
    threads(2)
    tensors = make_inputs(4, channels=40, length=9, states=4)
    y = selective_scan(*tensors, delta_softplus=True, backend="native")

    class Scans(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Tensor:
            return selective_scan(*tensors, delta_softplus=True, backend="native")

    loader = torch.utils.data.DataLoader(
        Scans(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    torch.testing.assert_close(next(iter(loader)), y)


def test_without_the_library(no_library, caplog):
    tensors = make_inputs(2, channels=3, length=5, states=2)
    with caplog.at_level(logging.INFO):
        y = selective_scan(*tensors, delta_softplus=True)
        selective_scan(*tensors, delta_softplus=True)
    torch.testing.assert_close(y, selective_scan(*tensors, delta_softplus=True, backend="reference"))
    assert [record.getMessage() for record in caplog.records] == [
        "selective scan on cpu: backend parallel, the slower one: the native library was not built"
    ]
    with pytest.raises(ValueError, match="'native' cannot serve: the native library was not built"):
        selective_scan(*tensors, backend="native")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "was not built; install the package again with a C"),
        (b"", "cannot be used: .*file too short"),
        (b"\x7fELF" + bytes(100), "cannot be used"),
    ],
)
def test_a_library_that_cannot_be_loaded(content, reason, monkeypatch, tmp_path):
    if content is not None:
        (tmp_path / "_scan.abi3.so").write_bytes(content)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert re.search(reason, str(native._load.__wrapped__()))


@needs_library
@pytest.mark.parametrize("share", [0.002, 0.5, 0.95])
def test_a_truncated_library(share, tmp_path):
    """An install that was interrupted: in a process of its own, as to load such a file would kill it."""
    content = next(Path(native.__file__).parent.glob("_scan.*so")).read_bytes()
    (tmp_path / "_scan.abi3.so").write_bytes(content[: int(share * len(content))])
    code = "import sys; from timm_mamba_pkd.ops import native; native.__file__ = sys.argv[1]; print(native._load())"
    command = [sys.executable, "-c", code, str(tmp_path / "native.py")]
    load = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert load.stdout.endswith("_scan.abi3.so is truncated; install the package again\n"), load


@needs_library
def test_a_library_of_another_version(monkeypatch):
    monkeypatch.setattr(native, "_Scan", native._Tensor)
    assert "of another version; install the package again" in str(native._load.__wrapped__())


def test_the_environment_chooses(monkeypatch):
    tensors = make_inputs(2, channels=3, length=5, states=2)
    calls = []

    def forward(*arguments):
        calls.append("parallel")
        return parallel.forward(*arguments)

    parallel = BACKENDS["parallel"]
    monkeypatch.setitem(BACKENDS, "parallel", parallel._replace(forward=forward))
    monkeypatch.setenv(VARIABLE, "parallel")
    selective_scan(*tensors)
    assert calls == ["parallel"]
    monkeypatch.setenv(VARIABLE, "")  # as if it were not set
    selective_scan(*tensors)
    assert calls == ["parallel"] or native.unavailable(CPU)
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match=rf"unknown backend 'fast' \(by {VARIABLE}\); choose one of \['auto'"):
        selective_scan(*tensors)


@pytest.mark.parametrize("where", [["--build-lib", "built"], ["--inplace"]])  # an install, an editable one
def test_an_install_without_a_compiler(where, tmp_path):
    """It succeeds, with one line of warning and no library."""
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "README.md", "LICENSE", "timm_mamba_pkd"):
        source, ignore = ROOT / name, shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        shutil.copytree(source, tmp_path / name, ignore=ignore) if source.is_dir() else shutil.copy(source, tmp_path)
    build = subprocess.run(
        [sys.executable, "-c", "import setuptools; setuptools.setup()", "build_ext", *where],
        env={**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    assert (build.stdout + build.stderr).count("no native selective scan, PyTorch's operators serve instead") == 1
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("flags", ["-mavx2 -mfma", "-march=x86-64-v4"])
@pytest.mark.parametrize("source", ["portable", "portable_double", "avx2"])
def test_the_users_flags(source, flags):
    """CFLAGS=-march=native gives every instruction set's source more than its own."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no compiler")
    file = CSRC / f"{source}.cpp"
    own = ["-mavx2", "-mfma"] if source == "avx2" else []
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wno-psabi", "-Wno-unknown-pragmas"]
    subprocess.run([*command, *flags.split(), *own, str(file)], check=True)


FUZZ = """
import ctypes, random, sys
import torch
from timm_mamba_pkd.ops import BACKENDS, native

library, seed, rounds, best = sys.argv[1], *map(int, sys.argv[2:])
loaded = ctypes.CDLL(library)
native._load = lambda: loaded
random.seed(seed)
torch.manual_seed(seed)

def tensor(*shape):
    "Of random dtype and strides: padded, expanded, transposed or plain."
    order = random.choice([(0, 1, 2), (0, 2, 1), (2, 1, 0)])
    x = torch.randn([shape[i] + random.choice([0, 0, 3]) for i in order])
    x = x.permute(*(order.index(i) for i in range(3)))[tuple(slice(0, n) for n in shape)]
    if random.random() < 0.1:
        x = x[:1].expand(shape)
    return x.to(random.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))

for round in range(rounds):
    torch.set_num_threads(random.choice([1, 2, 3]))
    sizes = [1, 2, 5], [1, 3, 16, 17, 50], [1, 2, 7, 8, 9, 31], [1, 3, 4, 17]
    batch, channels, length, states = map(random.choice, sizes)
    u, delta, z, dy = (tensor(batch, channels, length) for _ in range(4))
    B, C = (tensor(batch, states, length) for _ in range(2))
    A, D, bias = -torch.rand(channels, states), torch.randn(channels), torch.randn(channels)
    optional = [x if random.random() < 0.7 else None for x in (D, z, bias)]
    arguments = (u, delta, A, B, C, *optional, True, random.random() < 0.5)
    chosen = random.randint(0, best)
    native.instruction_set = lambda: chosen
    y, saved = native.forward(*arguments, True)
    grads = native.backward(dy.to(y.dtype), saved if random.random() < 0.5 else saved[:0], *arguments)
    parallel = BACKENDS["parallel"]
    true, nothing = parallel.forward(*arguments, True)
    pairs = list(zip([y, *grads], [true, *parallel.backward(dy.to(y.dtype), nothing, *arguments)]))
    arguments = (u, torch.randn(channels, random.choice([1, 2, 4, 5])), optional[2], random.random() < 0.5)
    pairs.append((native.convolve(*arguments), parallel.convolve(*arguments)))
    dy = dy.to(u.dtype)
    pairs += zip(native.convolve_backward(dy, *arguments), parallel.convolve_backward(dy, *arguments))
    for one, other in pairs:
        if one is not None:
            rounding = 1e-4 if one.dtype in (torch.float32, torch.float64) else 1e-2
            torch.testing.assert_close(one, other, rtol=0, atol=rounding * max(0.01, other.abs().max().item()))
print("survived", rounds)
"""


@needs_library
def test_fuzz_under_address_sanitizer(tmp_path):
    """Random shapes, strides and dtypes: no access outside the tensors, and the numbers of the parallel backend."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("this g++ has no AddressSanitizer")
    flags = {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"]}
    objects = []
    for source in sorted(CSRC.glob("*.cpp")):
        objects.append(str(tmp_path / f"{source.stem}.o"))
        command = [compiler, "-O1", "-std=c++17", "-fPIC", "-fopenmp", "-fsanitize=address", "-Wno-psabi"]
        subprocess.run([*command, *flags.get(source.stem, []), "-c", str(source), "-o", objects[-1]], check=True)
    library = tmp_path / "scan.so"
    subprocess.run([compiler, "-shared", "-fopenmp", "-fsanitize=address", *objects, "-o", str(library)], check=True)
    exceptions = subprocess.run(
        [compiler, "-print-file-name=libstdc++.so"], capture_output=True, text=True
    ).stdout.strip()
    fuzz = subprocess.run(
        [sys.executable, "-c", FUZZ, str(library), str(random.randrange(2**31)), "150", str(native.instruction_set())],
        # Python does without libstdc++, whose exceptions the sanitizer looks up as it starts.
        env={
            **os.environ,
            "LD_PRELOAD": f"{runtime} {exceptions}",
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert fuzz.stdout.endswith("survived 150\n"), fuzz.stdout[-2000:] + fuzz.stderr[-6000:]
