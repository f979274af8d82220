"""The selective scan and its convolution by the CUDA kernels of mamba-ssm and causal-conv1d, the extra ``[cuda]``.

Both packages are imported when a CUDA device is first asked for, never before, and are used only after a small forward
and backward has given the numbers of the reference. Of each only the public function is called, which autograd
differentiates: the backward runs the forward again. The kernels sum some gradients by atomic additions, so that two
runs agree only up to rounding.

What the kernels cannot take goes to the parallel backend: float64 arithmetic, more than 256 states, widths of the
convolution other than 2 to 4, sizes beyond their 32-bit indices; and every convolution where causal-conv1d is missing
or wrong. Kernels trust their pointers: every tensor passed is dense and aligned, and of the dtype that they expect.
"""

import importlib
import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_mamba_pkd.ops import parallel
from timm_mamba_pkd.ops.contract import compute_dtype
from timm_mamba_pkd.ops.reference import selective_scan_reference

DEVICE = "cuda"
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_ALIGNMENT = 16  # bytes, of a vector load
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2**-6}
_logger = logging.getLogger(__name__)


class Kernels(NamedTuple):
    """mamba-ssm's selective_scan_fn, and causal_conv1d_fn if it can be used."""

    scan: Callable[..., Tensor]
    convolution: Callable[..., Tensor] | None


def unavailable(device: torch.device) -> str | None:
    """Why the backend cannot serve on a device; None if it can. Shapes alone ("meta") it always can.

    The first question about a CUDA device imports mamba-ssm, which takes seconds.
    """
    if device.type == "meta":
        return None
    if device.type != DEVICE:
        return f"it runs on CUDA devices, not on {device}"
    kernels = _load()
    return kernels if isinstance(kernels, str) else None


@cache
def _load() -> Kernels | str:
    """The kernels, or why there are none."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    # A new thread has none of the caller's modes: fake tensors, inference, autocast, a default device.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_import, torch.device(DEVICE, index)).result()


def _import(device: torch.device) -> Kernels | str:
    try:
        interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        if getattr(interface, "selective_scan_cuda", True) is None:
            return "mamba-ssm was installed without its CUDA extension selective_scan_cuda"
        scan = interface.selective_scan_fn
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "mamba_ssm":
            return "mamba-ssm is not installed: pip install 'timm_mamba_pkd[cuda]'"
        return f"mamba-ssm cannot be imported: {_describe(error)}"
    try:
        _probe_scan(scan, device)
    except BaseException as error:
        return f"mamba-ssm failed its test on {device}: {_describe(error)}"
    try:
        convolution = importlib.import_module("causal_conv1d").causal_conv1d_fn
        _probe_convolution(convolution, device)
    except BaseException as error:
        _logger.warning("causal-conv1d cannot serve, PyTorch's convolution does: %s", _describe(error))
        convolution = None
    return Kernels(scan, convolution)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _kernels() -> Kernels:
    kernels = _load()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    return kernels


def saved_shape(u: Tensor, A: Tensor) -> list[int]:
    """Nothing is saved for the backward."""
    return [0]


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
    """y (batch, channels, length), in the dtype and layout of u; nothing is saved for the backward."""
    if not _can_scan(u, delta, A, B, C):
        return parallel.forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save)
    arguments = _scan_arguments(u, delta, A, B, C, D, z, delta_bias, reverse)
    y = _apply(partial(_kernels().scan, delta_softplus=delta_softplus), arguments, u, reverse)
    return y, u.new_empty(0, dtype=torch.float32)


def backward(
    dy: Tensor,
    saved: Tensor,
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
    if not _can_scan(u, delta, A, B, C):
        return parallel.backward(dy, saved, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    kernel = partial(_kernels().scan, delta_softplus=delta_softplus)
    arguments = _scan_arguments(u, delta, A, B, C, D, z, delta_bias, reverse)
    return _differentiate(kernel, arguments, dy, [u, delta, A, B, C, D, z, delta_bias], reverse)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """silu of the causal depthwise convolution of x (batch, channels, length), in the dtype and layout of x."""
    kernel = _kernels().convolution
    if kernel is None or not _can_convolve(x, weight):
        return parallel.convolve(x, weight, bias, reverse)
    return _apply(partial(kernel, activation="silu"), _convolution_arguments(x, weight, bias, reverse), x, reverse)


def convolve_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> list[Tensor | None]:
    """The gradients of x, weight and bias, each in the dtype and layout of its input."""
    kernel = _kernels().convolution
    if kernel is None or not _can_convolve(x, weight):
        return parallel.convolve_backward(dy, x, weight, bias, reverse)
    arguments = _convolution_arguments(x, weight, bias, reverse)
    return _differentiate(partial(kernel, activation="silu"), arguments, dy, [x, weight, bias], reverse)


def _can_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> bool:
    states = A.shape[1]
    return compute_dtype(u, delta, A, B, C) == torch.float32 and states <= 256 and _can_index(u, states)


def _can_convolve(x: Tensor, weight: Tensor) -> bool:
    return torch.float64 not in (x.dtype, weight.dtype) and 2 <= weight.shape[1] <= 4 and _can_index(x, 1)


def _can_index(x: Tensor, states: int) -> bool:
    batch, channels, length = x.shape
    return batch * max(channels, states) * max(length, states) < 2**31 and channels < 2**16


def _scan_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    reverse: bool,
) -> list[Any]:
    """The eight tensors as mamba-ssm takes them: sequences in one dtype, parameters in float32."""
    sequences = [tensor for tensor in (u, delta, B, C, z) if tensor is not None]
    dtype = u.dtype if u.dtype in _TYPES and all(x.dtype == u.dtype for x in sequences) else torch.float32

    def convert(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        out = tensor.new_empty(tensor.shape, dtype=dtype if tensor.dim() == 3 else torch.float32)
        return _convert(tensor, out, reverse)

    return [convert(tensor) for tensor in (u, delta, A, B, C, D, z, delta_bias)]


def _convolution_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> list[Any]:
    """x, weight and bias as causal-conv1d takes them: x in either layout, parameters in float32."""
    batch, channels, length = x.shape
    dtype = x.dtype if x.dtype in _TYPES else torch.float32
    if x.stride(1) == 1 and channels % 8 == 0:
        out = x.new_empty(batch, length, channels, dtype=dtype).transpose(1, 2)
    else:
        out = x.new_empty(x.shape, dtype=dtype)
    parameters = [
        None if tensor is None else _convert(tensor, tensor.new_empty(tensor.shape, dtype=torch.float32), False)
        for tensor in (weight, bias)
    ]
    return [_convert(x, out, reverse), *parameters]


def _convert(tensor: Tensor, out: Tensor, reverse: bool) -> Tensor:
    """The tensor in the dtype and strides of out and aligned, a sequence also flipped; itself if nothing changes."""
    if reverse and tensor.dim() == 3:
        tensor = tensor.flip(-1)
    same = (tensor.dtype, tensor.stride()) == (out.dtype, out.stride()) and tensor.data_ptr() % _ALIGNMENT == 0
    return tensor if same else out.copy_(tensor)


def _apply(kernel: Callable[..., Tensor], arguments: list[Any], like: Tensor, reverse: bool) -> Tensor:
    """The kernel's result in the dtype and layout of a tensor."""
    with torch.no_grad():
        y = kernel(*arguments)
        return _convert(y, torch.empty_like(like), reverse)


def _differentiate(
    kernel: Callable[..., Tensor], arguments: list[Any], dy: Tensor, inputs: list[Any], reverse: bool
) -> list[Tensor | None]:
    """The gradients of the arguments, in the dtypes and layouts of the inputs that they were made from."""
    dy = _convert(dy, torch.empty_like(arguments[0]), reverse)
    leaves = [None if argument is None else argument.detach().requires_grad_() for argument in arguments]
    with torch.enable_grad():
        y = kernel(*leaves)
    grads = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy))
    return [None if x is None else _convert(next(grads), torch.empty_like(x), reverse) for x in inputs]


def _probe_scan(scan: Callable[..., Tensor], device: torch.device) -> None:
    """Raise ArithmeticError unless y and all gradients are those of the reference."""
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    generator = torch.Generator().manual_seed(0)
    for length, dtype, optional, reverse in itertools.product((9, 128), _TOLERANCES, (True, False), (False, True)):
        sequences = torch.randn(6, 2, 8, length, generator=generator, dtype=torch.float32).to(dtype)
        A, D, delta_bias = torch.randn(3, 8, 8, generator=generator, dtype=torch.float32)
        u, delta, B, C, z, dy = sequences
        inputs = [u, delta, -A.abs(), B, C, *((D[0], z, delta_bias[0]) if optional else (None, None, None))]
        true = partial(selective_scan_reference, delta_softplus=True, reverse=reverse)
        _compare(partial(scan, delta_softplus=True), _scan_arguments, true, names, inputs, dy, reverse, device)


def _probe_convolution(convolution: Callable[..., Tensor], device: torch.device) -> None:
    """Raise ArithmeticError unless y and all gradients are those of PyTorch's convolution."""
    kernel, names = partial(convolution, activation="silu"), ("x", "weight", "bias")
    generator = torch.Generator().manual_seed(0)

    def true(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padded = F.pad(x, (weight.shape[1] - 1, 0))
        return F.silu(F.conv1d(padded, weight[:, None], bias, groups=len(weight)))

    for length, dtype, channels_last, width in itertools.product((9, 128), _TOLERANCES, (True, False), (2, 3, 4)):
        shape = (2, 2, length, 8) if channels_last else (2, 2, 8, length)
        x, dy = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        x, dy = (x.transpose(1, 2), dy.transpose(1, 2)) if channels_last else (x, dy)
        weight, bias = torch.randn(2, 8, width, generator=generator, dtype=torch.float32)
        _compare(kernel, _convolution_arguments, true, names, [x, weight, bias[:, 0]], dy, False, device)


def _compare(
    kernel: Callable[..., Tensor],
    make_arguments: Callable[..., list[Any]],
    true: Callable[..., Tensor],
    names: Sequence[str],
    inputs: list[Any],
    dy: Tensor,
    reverse: bool,
    device: torch.device,
) -> None:
    """Compare y and all gradients with those of the true function in float64 on the CPU."""
    leaves = [None if x is None else x.double().requires_grad_() for x in inputs]
    true_y = true(*leaves)
    true_grads = torch.autograd.grad(true_y, [x for x in leaves if x is not None], dy.double())

    inputs = [None if x is None else x.to(device) for x in inputs]
    arguments = make_arguments(*inputs, reverse)
    y = _apply(kernel, arguments, inputs[0], reverse)
    grads = [x for x in _differentiate(kernel, arguments, dy.to(device), inputs, reverse) if x is not None]

    present = [f"the gradient of {name}" for name, x in zip(names, inputs, strict=True) if x is not None]
    for name, actual, expected in zip(["y", *present], [y, *grads], [true_y, *true_grads], strict=True):
        error = ((actual.cpu() - expected).abs().max() / expected.abs().max()).item()
        if not error < _TOLERANCES[dy.dtype]:
            raise ArithmeticError(f"{name} differs from the reference by {error:.1e}")
