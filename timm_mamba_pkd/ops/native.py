"""The selective scan and its convolution in native code, on CPUs: a SIMD lane per channel, time in sequence, all fused.

The library of ``csrc/`` is built with the package where there is a compiler. Its interface is plain C, so that one
binary serves every version of torch; this file keeps its promises: every pointer passed has the type, size and strides
that ``csrc/scan.h`` states. The forward leaves the states before every eighth step, from which the backward recomputes
the others.
"""

import ctypes
import struct
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from timm_mamba_pkd.ops.contract import compute_dtype

INSTRUCTION_SETS = ("portable", "AVX2", "AVX-512")
_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_CHUNK, _PADDING = 8, 16  # of csrc/scan.h


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("time_stride", ctypes.c_int64),
        ("type", ctypes.c_int64),
    ]


class _Scan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "length", "states")),
        *((name, ctypes.c_int64) for name in ("is_double", "softplus", "reverse", "threads", "groups")),
        *((name, _Tensor) for name in ("u", "delta", "B", "C", "z")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "delta_bias")),
        ("y", _Tensor),
        ("checkpoints", ctypes.c_void_p),
        *((name, _Tensor) for name in ("dy", "du", "ddelta", "dz")),
        *((name, ctypes.c_void_p) for name in ("dB", "dC", "dA", "dD", "ddelta_bias")),
    ]


class _Convolution(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "length", "width")),
        *((name, ctypes.c_int64) for name in ("is_double", "reverse", "threads")),
        ("x", _Tensor),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, _Tensor) for name in ("y", "dy", "dx")),
        *((name, ctypes.c_void_p) for name in ("dweight", "dbias")),
    ]


_FUNCTIONS = {
    "timm_mamba_pkd_scan_forward": _Scan,
    "timm_mamba_pkd_scan_backward": _Scan,
    "timm_mamba_pkd_convolve": _Convolution,
    "timm_mamba_pkd_convolve_backward": _Convolution,
}


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    files = sorted(Path(__file__).parent.glob("_scan.*so"))
    if not files:
        return "the native library was not built; install the package again with a C++ compiler (g++ or clang++)"
    try:
        if _truncated(files[0]):
            return f"the native library {files[0]} is truncated; install the package again"
        library = ctypes.CDLL(str(files[0]))
        sizes = library.timm_mamba_pkd_sizes()
    except (OSError, AttributeError) as error:
        return f"the native library {files[0]} cannot be used: {error}"
    if sizes != ctypes.sizeof(_Scan) << 16 | ctypes.sizeof(_Convolution):
        return f"the native library {files[0]} is of another version; install the package again"
    for name, structure in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.POINTER(structure), ctypes.c_int64]
        function.restype = ctypes.c_int64
    library.timm_mamba_pkd_instruction_set.restype = ctypes.c_int64
    return library


def _truncated(library: Path) -> bool:
    """Whether an ELF file ends before its last part, the section headers: to load it could kill the process."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":  # not ELF, or not of a 64-bit little-endian processor
        return False
    (start,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return library.stat().st_size < start + size * count


def unavailable(device: torch.device) -> str | None:
    """Why the backend cannot serve on a device; None if it can. Shapes alone ("meta") are as the CPU."""
    if device.type not in ("cpu", "meta"):
        return f"it runs on the CPU, not on {device}"
    library = _load()
    return library if isinstance(library, str) else None


@cache
def instruction_set() -> int:
    """Index into ``INSTRUCTION_SETS`` of the best one that this processor has."""
    return _library().timm_mamba_pkd_instruction_set()


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def saved_shape(u: Tensor, A: Tensor) -> list[int]:
    """Shape of what the forward saves for the backward."""
    batch, channels, length = u.shape
    return [batch, -(-length // _CHUNK), -(-channels // _PADDING) * _PADDING, A.shape[1]]


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (batch, channels, length), in the dtype and layout of u, and the checkpoints, empty unless ``save``."""
    call = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    y = call.output("y", u)
    checkpoints = torch.empty(saved_shape(u, A) if save else 0, dtype=call.dtype)
    if save:
        call.point("checkpoints", checkpoints)
    call.run("timm_mamba_pkd_scan_forward")
    return _like(y, u), checkpoints


def backward(
    dy: Tensor,
    checkpoints: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> list[Tensor | None]:
    """The gradients of u, delta, A, B, C, D, z and delta_bias, each in the dtype and layout of its input."""
    if checkpoints.numel() == 0:
        checkpoints = forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save=True)[1]
    call = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    call.point("checkpoints", checkpoints)
    call.input("dy", dy)
    du, ddelta = call.output("du", u), call.output("ddelta", delta)
    dz = None if z is None else call.output("dz", z)
    batch, _, length = u.shape
    dB, dC = (call.zeros(name, (batch, call.structure.groups, length, A.shape[1])) for name in ("dB", "dC"))
    dA = call.zeros("dA", A.shape)
    dD = None if D is None else call.zeros("dD", D.shape)
    dbias = None if delta_bias is None else call.zeros("ddelta_bias", delta_bias.shape)
    call.run("timm_mamba_pkd_scan_backward")
    return [
        _like(du, u),
        _like(ddelta, delta),
        _like(dA, A),
        _like((dB.sum(1) if dB.shape[1] > 1 else dB[:, 0]).transpose(1, 2), B),
        _like((dC.sum(1) if dC.shape[1] > 1 else dC[:, 0]).transpose(1, 2), C),
        None if dD is None or D is None else _like(dD, D),
        None if dz is None or z is None else _like(dz, z),
        None if dbias is None or delta_bias is None else _like(dbias, delta_bias),
    ]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """silu of the causal depthwise convolution of x (batch, channels, length), in the dtype and layout of x."""
    call = _convolution(x, weight, bias, reverse)
    y = call.output("y", x)
    call.run("timm_mamba_pkd_convolve")
    return _like(y, x)


def convolve_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> list[Tensor | None]:
    """The gradients of x, weight and bias, each in the dtype and layout of its input."""
    call = _convolution(x, weight, bias, reverse)
    call.input("dy", dy)
    dx = call.output("dx", x)
    dweight = call.zeros("dweight", weight.shape)
    dbias = None if bias is None else call.zeros("dbias", bias.shape)
    call.run("timm_mamba_pkd_convolve_backward")
    return [_like(dx, x), _like(dweight, weight), None if dbias is None or bias is None else _like(dbias, bias)]


class _Call:
    """A structure for a native function, and every tensor that it points to."""

    def __init__(self, structure: _Scan | _Convolution, dtype: torch.dtype) -> None:
        self.structure = structure
        self.dtype = dtype
        self._alive: list[Tensor] = []
        structure.is_double = dtype == torch.float64
        structure.threads = torch.get_num_threads()

    def input(self, name: str, tensor: Tensor) -> None:
        """Pass (batch, features, length), copied unless its features are contiguous and its dtype is known."""
        tensor = tensor.resolve_neg()
        if tensor.dtype not in _TYPES:
            tensor = tensor.to(self.dtype)
        if not _contiguous_features(tensor):
            tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        self._pass(name, tensor)

    def matrix(self, name: str, tensor: Tensor) -> None:
        """Pass a parameter, contiguous and in the dtype of the arithmetic."""
        self.point(name, tensor.to(self.dtype).resolve_neg().contiguous())

    def output(self, name: str, like: Tensor) -> Tensor:
        """Pass memory for (batch, features, length): empty_like(like), if its features are contiguous."""
        out = torch.empty_like(like)
        if out.dtype not in _TYPES or not _contiguous_features(out):
            batch, features, length = like.shape
            dtype = out.dtype if out.dtype in _TYPES else self.dtype
            out = torch.empty(batch, length, features, dtype=dtype).transpose(1, 2)
        self._pass(name, out)
        return out

    def zeros(self, name: str, shape: tuple[int, ...]) -> Tensor:
        out = torch.zeros(shape, dtype=self.dtype)
        self.point(name, out)
        return out

    def point(self, name: str, tensor: Tensor) -> None:
        setattr(self.structure, name, self._pointer(tensor))

    def run(self, function: str) -> None:
        if getattr(_library(), function)(ctypes.byref(self.structure), instruction_set()):
            raise MemoryError(f"{function} found no memory for its threads")

    def _pass(self, name: str, tensor: Tensor) -> None:
        data = _Tensor(self._pointer(tensor), tensor.stride(0), tensor.stride(2), _TYPES[tensor.dtype])
        setattr(self.structure, name, data)

    def _pointer(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        return tensor.data_ptr()


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> _Call:
    batch, channels, length = u.shape
    threads = torch.get_num_threads()
    uneven = batch % threads != 0 and batch < 4 * threads
    structure = _Scan(
        batch=batch,
        channels=channels,
        length=length,
        states=A.shape[1],
        softplus=delta_softplus,
        reverse=reverse,
        groups=min(threads, -(-channels // _PADDING)) if uneven else 1,
    )
    call = _Call(structure, compute_dtype(u, delta, A, B, C))
    for name, tensor in (("u", u), ("delta", delta), ("B", B), ("C", C), ("z", z)):
        if tensor is not None:
            call.input(name, tensor)
    for name, tensor in (("A", A), ("D", D), ("delta_bias", delta_bias)):
        if tensor is not None:
            call.matrix(name, tensor)
    return call


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> _Call:
    batch, channels, length = x.shape
    structure = _Convolution(batch=batch, channels=channels, length=length, width=weight.shape[1], reverse=reverse)
    double = torch.float64 in (x.dtype, weight.dtype)
    call = _Call(structure, torch.float64 if double else torch.float32)
    call.input("x", x)
    call.matrix("weight", weight)
    if bias is not None:
        call.matrix("bias", bias)
    return call


def _contiguous_features(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1 or tensor.shape[1] == 1


def _like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the dtype and strides of empty_like(like), itself if it has them."""
    out = torch.empty_like(like)
    if tensor.dtype == out.dtype and tensor.stride() == out.stride():
        return tensor
    return out.copy_(tensor)
