"""CUDA kernels for NVIDIA GPUs, called through the C interface of csrc/ctp.h: dense int4, forward."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch

from .. import _build
from ..errors import CTPError
from ..format import Format
from .c_interface import DTYPES, Weight, bias_for, rows_contiguous, weight_of


def unsupported(
    format: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    direction: str,
    compute: str = "exact",
) -> str | None:
    """Why this backend cannot do it, or None."""
    if compute != "exact":
        return "it has no int8 activations"
    if direction != "forward":
        return "the CUDA backend has no backward kernel yet"
    if format.pattern != "dense" or format.values != "int4":
        return f"the CUDA kernel does dense int4 only, not {format}"
    if dtype not in DTYPES:
        return f"activations are {str(dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
    if device.type != "cuda":
        return f"tensors are on {device.type}, not on a CUDA device"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"  # asked first: without one, nothing is compiled for it
    library = _library()
    return library if isinstance(library, str) else no_device(library)


def matmul(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    format: Format,
    n: int,
    bias: torch.Tensor | None,
    compute: str = "exact",
) -> torch.Tensor:
    """y (M, N) = x (M, K) W^T + bias, summed in fp32, rounded once to x's dtype."""
    library = _library()
    if isinstance(library, str):
        raise CTPError(library)
    with torch.cuda.device(x.device):
        return launch(library, x, tensors, format, n, bias, torch.cuda.current_stream().cuda_stream)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    try:
        return declare(_build.load("cuda"))
    except _build.BuildError as error:
        return str(error)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the argument types of csrc/ctp.h."""
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.ctp_cuda_int4_matmul.argtypes = (
        *(ctypes.POINTER(Weight), pointer, i64, i64, pointer, pointer),
        *(i32, pointer),
    )
    library.ctp_cuda_device_count.argtypes = (ctypes.POINTER(i32),)
    library.ctp_cuda_status_string.restype = ctypes.c_char_p
    return library


def no_device(library: ctypes.CDLL) -> str | None:
    """Why the library finds no GPU, in the driver's words, or None where it finds one."""
    count = ctypes.c_int32()
    status = library.ctp_cuda_device_count(ctypes.byref(count))
    if status:
        return f"no usable GPU: {_sentence(library, status)}"
    return None if count.value else "no usable GPU: the driver lists none"


def launch(
    library: ctypes.CDLL,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    format: Format,
    n: int,
    bias: torch.Tensor | None,
    stream: int,
) -> torch.Tensor:
    """`matmul` on the raw stream `stream` of the current device. Raises CTPError when the launch fails."""
    m, k = x.shape
    weight = weight_of(tensors, format, n, k)
    x = rows_contiguous(x)
    bias, bias_pointer = bias_for(bias, n, x.dtype)
    y = x.new_empty((m, n))
    status = library.ctp_cuda_int4_matmul(
        weight, x.data_ptr(), x.stride(0), m, bias_pointer, y.data_ptr(), DTYPES[x.dtype], stream
    )
    if status:
        raise CTPError(f"the CUDA int4 kernel failed: {_sentence(library, status)}")
    return y


def _sentence(library: ctypes.CDLL, status: int) -> str:
    return library.ctp_cuda_status_string(status).decode()
