"""The C++ kernels of libctp_cpu: every format, forward and dX, fp32/fp16/bf16 activations, on torch's own threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

import torch

from .. import _build
from ..errors import CTPError
from ..format import Format
from .c_interface import DTYPES, Weight, bias_for, weight_of

Matmul = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

_CPU = torch.device("cpu")
_COMPUTE = {"exact": 0, "int8": 1}
_ISAS = {"best": -1, "baseline": 0, "avx2": 1, "avx512": 2, "amx": 3}


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    try:
        library = _build.load("cpu")
    except _build.BuildError as error:
        return str(error)
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    weight = ctypes.POINTER(Weight)
    library.ctp_cpu_matmul.argtypes = (weight, pointer, i64, i64, pointer, pointer, i32, i32, i32)
    library.ctp_cpu_matmul_t.argtypes = (weight, pointer, i64, i64, pointer, i32, i32)
    library.ctp_cpu_multiply_add.argtypes, library.ctp_cpu_multiply_add.restype = (i64, i32), i64
    library.ctp_cpu_isa.restype = library.ctp_cpu_status_string.restype = ctypes.c_char_p
    return library


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise CTPError(library)
    return library


def available() -> str | None:
    """Why the kernels cannot run here, or None where they can."""
    library = _library()
    return library if isinstance(library, str) else None


def unsupported(
    format: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    direction: str,
    compute: str = "exact",
) -> str | None:
    if device.type != "cpu":
        return f"tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"activations are {str(dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
    return available()


def isa() -> str:
    """The instruction set in use: "amx", "avx512", "avx2" or "baseline"."""
    return _loaded().ctp_cpu_isa().decode()


def describe(format: Format, shape: tuple[int, int], dtype: torch.dtype, rows: int, direction: str) -> str:
    """How so many rows run: by the processor's instructions; which kernel of theirs, the values of x decide, too."""
    return f"{isa()} kernels, {torch.get_num_threads()} threads"


def set_isa(name: str) -> None:
    """Run this instruction set ("best" for what the processor has) from now on, in the whole process; for tests.

    Raises CTPError where the processor lacks it.
    """
    _check(_loaded(), _loaded().ctp_cpu_set_isa(_ISAS[name]))


def multiply_add(turns: int) -> int:
    """Multiply-adds in registers on torch's threads, to be timed: the number of floating-point operations done."""
    return _loaded().ctp_cpu_multiply_add(turns, torch.get_num_threads())


def matmul(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    format: Format,
    n: int,
    bias: torch.Tensor | None,
    compute: str = "exact",
) -> torch.Tensor:
    """y (M, N) = x (M, K) W^T + bias, summed in fp32, rounded once to x's dtype."""
    return bind(tensors, format, n, x.shape[-1], compute)(x, bias)


def bind(tensors: Sequence[torch.Tensor], format: Format, n: int, k: int, compute: str = "exact") -> Matmul:
    """(x (..., K), bias) -> y (..., N), as `matmul`: what depends on the weight alone is found once."""
    library, mode = _loaded(), _COMPUTE[compute]
    weight, call = weight_of(tensors, format, n, k, _CPU), library.ctp_cpu_matmul

    def run(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        *rows, _ = x.shape
        m, apart = prod(rows), k
        if not x.is_contiguous():
            x = _laid_out(x.reshape(m, k))
            apart = x.stride(0)
        bias, bias_pointer = bias_for(bias, n, x.dtype)
        y = x.new_empty((*rows, n))
        threads = torch.get_num_threads()
        status = call(weight, x.data_ptr(), apart, m, bias_pointer, y.data_ptr(), DTYPES[x.dtype], mode, threads)
        if status:
            _check(library, status)
        return y

    return run


def matmul_t(dy: torch.Tensor, tensors: Sequence[torch.Tensor], format: Format, k: int) -> torch.Tensor:
    """dx (M, K) = dy (M, N) W, summed as in `matmul`."""
    library, (m, n) = _loaded(), dy.shape
    weight = weight_of(tensors, format, n, k, _CPU)
    dy = _laid_out(dy)
    dx = dy.new_empty((m, k))
    threads = torch.get_num_threads()
    status = library.ctp_cpu_matmul_t(weight, dy.data_ptr(), dy.stride(0), m, dx.data_ptr(), DTYPES[dy.dtype], threads)
    if status:
        _check(library, status)
    return dx


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """x as the kernels take it: in bf16, pairs of neighbours on even places, or the kernel would depend on strides."""
    apart = x.dtype == torch.bfloat16 and x.stride(0) % 2
    return x.contiguous() if apart or x.stride(1) != 1 else x


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise CTPError(f"the CPU kernel failed: {library.ctp_cpu_status_string(status).decode()}")
