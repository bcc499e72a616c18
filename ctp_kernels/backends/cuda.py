"""CUDA kernels for NVIDIA GPUs on tensor cores, forward and dX, called through the C interface of csrc/ctp.h."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

import torch

from .. import _build
from ..errors import CTPError
from ..format import Format
from ..patterns import TILE
from .c_interface import DTYPES, Weight, bias_for, weight_of

#: Values that have a kernel, by pattern; "same" is fp16 with fp16 activations and bf16 with bf16.
_VALUES = {
    "dense": ("int8", "int4", "int3", "int2"),
    "sparse24": ("int4", "int3", "same"),
    "unstructured": ("int4", "same"),
}
_TENSOR_CORE_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}

#: torch.cuda.current_device and current_stream().cuda_stream in a tenth of their time; a PyTorch without CUDA has none.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", None)  # type: ignore[assignment]
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # type: ignore[assignment]

_PLANES = ("values", "codes", "codes_hi", "mask")

#: The most rows for which "auto" takes these kernels, by pattern; for more, and backward, Triton or its dequantised
#: product were faster on an H200 (docs/gpu.md).
_MOST_ROWS = {"dense": 64, "sparse24": 64, "unstructured": 32}

_MOST_INPUTS = 2**20

#: Up to so many rows a block sums over all of K (matmul_few), and no workspace is needed, by pattern.
_FEW_ROWS = {"dense": 16, "sparse24": 16, "unstructured": 0}

#: Bytes in which blocks leave their parts of a sum; enough for every grid that would be split.
_WORKSPACE_BYTES = 16 * 2**20


def unsupported(
    format: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    direction: str,
    compute: str = "exact",
) -> str | None:
    """Why this backend cannot do it, or None."""
    reason = no_kernel(format, shape, dtype, direction, compute)
    if reason is not None:
        return reason
    if device.type != "cuda":
        return f"tensors are on {device.type}, not on a CUDA device"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"  # asked first: without one, nothing is compiled for it
    capability = torch.cuda.get_device_capability()
    if capability[0] not in (8, 9):
        return "the library holds no code for a GPU of compute capability {}.{}".format(*capability)
    library = _library()
    return library if isinstance(library, str) else no_device(library)


def no_kernel(
    format: Format, shape: tuple[int, int], dtype: torch.dtype, direction: str, compute: str = "exact"
) -> str | None:
    """Why no kernel was written for it, or None; whatever the machine."""
    if compute != "exact":
        return "it has no int8 activations"
    if shape[1] % TILE or shape[1] > _MOST_INPUTS:
        return f"{shape[1]} inputs are not a multiple of {TILE}, or more than 2^20"
    if format.pattern == "unstructured" and shape[0] * shape[1] >= 2**31:
        return f"{shape[0]} x {shape[1]} entries are more than 2^31"
    if dtype not in _TENSOR_CORE_DTYPES:
        return f"activations are {str(dtype).removeprefix('torch.')}, not float16 or bfloat16"
    values = "same" if format.values == _TENSOR_CORE_DTYPES[dtype] else format.values
    if values not in _VALUES[format.pattern]:
        if format.quantized or format.pattern == "dense":
            return f"there is no CUDA kernel for {format}"
        return f"{format.values} values are not multiplied with {_TENSOR_CORE_DTYPES[dtype]} activations"
    return _group_reason(format, shape[1], direction)


def slower(format: Format, rows: int, direction: str) -> str | None:
    """Why another backend should run so many rows, where it can, or None."""
    most = _MOST_ROWS[format.pattern] if direction == "forward" else 0
    return None if rows <= most else f"triton is faster {direction} at {rows} rows"


def describe(format: Format, shape: tuple[int, int], dtype: torch.dtype, rows: int, direction: str) -> str:
    """The kernel that takes so many rows."""
    return "matmul_t" if direction == "backward" else "matmul_few" if rows <= _FEW_ROWS[format.pattern] else "matmul"


def _group_reason(format: Format, k: int, direction: str) -> str | None:
    """The multiple of inputs that a group must be, where this one is not; mirrors group_fits of dispatch.cu."""
    if format.group_size is None or format.group_size >= k:
        return None
    multiple = 16 if direction == "backward" else 32 if format.pattern == "dense" else 128
    if format.group_size % multiple == 0:
        return None
    return f"groups of {format.group_size} inputs are not a multiple of {multiple}, as the {direction} kernel needs"


def matmul(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    format: Format,
    n: int,
    bias: torch.Tensor | None,
    compute: str = "exact",
) -> torch.Tensor:
    """y (M, N) = x (M, K) W^T + bias, summed in fp32, rounded once to x's dtype."""
    library = _loaded()
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        workspace = None if len(x) <= _FEW_ROWS[format.pattern] else _workspace(library, x.device, stream)
        return launch(library, x, tensors, format, n, bias, stream, workspace)


def bind(
    tensors: Sequence[torch.Tensor], format: Format, n: int, k: int, compute: str = "exact"
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """(x (..., K), bias) -> y (..., N), as `matmul`: what depends on the weight alone is found once."""
    library, device, aligned = _loaded(), tensors[0].device, not any(_misaligned(tensors, format))
    weight, call, index = weight_of(tensors, format, n, k, device), library.ctp_cuda_matmul, device.index or 0
    few = _FEW_ROWS[format.pattern]

    def run(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        *rows, _ = x.shape
        m = prod(rows)
        straight = aligned and m > 0 and x.is_contiguous() and x.data_ptr() % 16 == 0
        if not straight or _current_device() != index:
            return matmul(x.reshape(m, k), tensors, format, n, bias).view(*rows, n)
        bias, bias_pointer = bias_for(bias, n, x.dtype)
        y, stream = x.new_empty((*rows, n)), _current_stream(index)
        shared = _pointers(None if m <= few else _workspace(library, device, stream))
        status = call(weight, x.data_ptr(), k, m, bias_pointer, y.data_ptr(), DTYPES[x.dtype], *shared, stream)
        if status:
            raise CTPError(f"the CUDA kernel for {format} failed: {_sentence(library, status)}")
        return y

    return run


def matmul_t(dy: torch.Tensor, tensors: Sequence[torch.Tensor], format: Format, k: int) -> torch.Tensor:
    """dx (M, K) = dy (M, N) W, with W rounded to dy's dtype, summed in fp32, rounded once."""
    library = _loaded()
    with torch.cuda.device(dy.device):
        stream = torch.cuda.current_stream().cuda_stream
        return launch_t(library, dy, tensors, format, k, stream, _workspace(library, dy.device, stream))


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    try:
        return declare(_build.load("cuda"))
    except _build.BuildError as error:
        return str(error)


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise CTPError(library)
    return library


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the argument types of csrc/ctp.h."""
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    weight, shared = ctypes.POINTER(Weight), (pointer, pointer, i64)
    library.ctp_cuda_matmul.argtypes = (weight, pointer, i64, i64, pointer, pointer, i32, *shared, pointer)
    library.ctp_cuda_matmul_t.argtypes = (weight, pointer, i64, i64, pointer, i32, *shared, pointer)
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


#: counters and floats that the blocks of one call share; a pair for every stream, whose calls follow each other.
Workspace = tuple[torch.Tensor, torch.Tensor]
_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def new_workspace(library: ctypes.CDLL, device: torch.device, nbytes: int | None = None) -> Workspace:
    counters = torch.zeros(library.ctp_cuda_counters(), dtype=torch.int32, device=device)
    return counters, torch.empty((nbytes or _WORKSPACE_BYTES) // 4, dtype=torch.float32, device=device)


def _workspace(library: ctypes.CDLL, device: torch.device, stream: int) -> Workspace:
    """This stream's workspace. A graph under capture gets one for each call, from its own pool: it may run beside this
    stream, and CUDA graph trees allow nothing of the pool to live on."""
    if torch.cuda.is_current_stream_capturing():
        return new_workspace(library, device)
    found = _workspaces.get((device, stream))
    if found is None:
        found = _workspaces[device, stream] = new_workspace(library, device)
    return found


def launch(
    library: ctypes.CDLL,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    format: Format,
    n: int,
    bias: torch.Tensor | None,
    stream: int,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """`matmul` on the raw stream `stream` of the current device. Raises CTPError when the launch fails."""
    m, k = x.shape
    tensors = _aligned(tensors, format)
    weight = weight_of(tensors, format, n, k, x.device)
    x = _on_pieces(x)
    bias, bias_pointer = bias_for(bias, n, x.dtype)
    y = x.new_empty((m, n))
    call = (weight, x.data_ptr(), x.stride(0), m, bias_pointer, y.data_ptr(), DTYPES[x.dtype])
    status = library.ctp_cuda_matmul(*call, *_pointers(workspace), stream)
    if status:
        raise CTPError(f"the CUDA kernel for {format} failed: {_sentence(library, status)}")
    return y


def launch_t(
    library: ctypes.CDLL,
    dy: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    format: Format,
    k: int,
    stream: int,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """`matmul_t` on the raw stream `stream` of the current device. Raises CTPError when the launch fails."""
    m, n = dy.shape
    tensors = _aligned(tensors, format)
    weight = weight_of(tensors, format, n, k, dy.device)
    dy = _on_pieces(dy)
    dx = dy.new_empty((m, k))
    status = library.ctp_cuda_matmul_t(
        weight, dy.data_ptr(), dy.stride(0), m, dx.data_ptr(), DTYPES[dy.dtype], *_pointers(workspace), stream
    )
    if status:
        raise CTPError(f"the CUDA kernel for dX of {format} failed: {_sentence(library, status)}")
    return dx


def _misaligned(tensors: Sequence[torch.Tensor], format: Format) -> list[bool]:
    """Which buffers are planes that do not begin on 16 bytes."""
    named = zip(format.kernel_names, tensors, strict=True)
    return [name in _PLANES and tensor.data_ptr() % 16 != 0 for name, tensor in named]


def _aligned(tensors: Sequence[torch.Tensor], format: Format) -> list[torch.Tensor]:
    """The buffers, each plane on 16 bytes: a slice of a fused weight that begins elsewhere is copied every time."""
    wrong = _misaligned(tensors, format)
    return [tensor.clone() if bad else tensor for tensor, bad in zip(tensors, wrong, strict=True)]


def _on_pieces(x: torch.Tensor) -> torch.Tensor:
    """x (M, K) with its rows in one piece each, every one on 16 bytes, and near enough for 32-bit steps in bytes."""
    m, k = x.shape
    apart = x.stride(0) * x.element_size()
    if x.stride(1) == 1 and x.data_ptr() % 16 == 0 and (m == 1 or (apart % 16 == 0 and apart < 2**28)):
        return x
    return x.new_empty((m, -(-k // 8) * 8))[:, :k].copy_(x)


def _pointers(workspace: Workspace | None) -> tuple[int | None, int | None, int]:
    if workspace is None:
        return None, None, 0
    counters, floats = workspace
    return counters.data_ptr(), floats.data_ptr(), floats.nbytes


def _sentence(library: ctypes.CDLL, status: int) -> str:
    return library.ctp_cuda_status_string(status).decode()
