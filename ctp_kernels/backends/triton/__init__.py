"""Triton kernels for NVIDIA GPUs: every pattern, every kind of value, forward and backward.

plan.py chooses, launch.py launches, kernels.py loops over tiles, patterns.py and values.py decode them, tuned.py keeps
what was measured, warmup.py compiles (and measures) ahead of use. Triton is imported on use.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from ...format import FLOAT_DTYPES, Format


def unsupported(
    format: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    direction: str,
    compute: str = "exact",
) -> str | None:
    """Why this backend cannot do it, or None. CPU tensors are taken only under Triton's own interpreter."""
    if compute != "exact":
        return "it has no int8 activations"
    if dtype not in FLOAT_DTYPES.values():
        return f"activations are {_name(dtype)}, not float32, float16 or bfloat16"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8:
            return "the GPU is older than Ampere (compute capability 8.0)"
        return None
    if device.type == "cpu" and _interpreted():
        return None
    return f"tensors are on {device.type}, not on a CUDA device"


def matmul(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    format: Format,
    n: int,
    bias: torch.Tensor | None,
    compute: str = "exact",
) -> torch.Tensor:
    """y (M, N) = x (M, K) W^T + bias, summed in fp32, rounded once to x's dtype."""
    from .launch import matmul as run

    return run(x, tensors, format, n, bias)


def matmul_t(dy: torch.Tensor, tensors: Sequence[torch.Tensor], format: Format, k: int) -> torch.Tensor:
    """dx (M, K) = dy (M, N) W, summed in fp32, rounded once to dy's dtype."""
    from .launch import matmul_t as run

    return run(dy, tensors, format, k)


def describe(format: Format, shape: tuple[int, int], dtype: torch.dtype, rows: int, direction: str) -> str:
    """The plan for so many rows on this machine's GPU, or, where there is none, on an H100 that was not tuned."""
    from .. import row_class
    from . import tuned
    from .launch import properties_of
    from .plan import plan_for

    gpu = properties_of(torch.cuda.current_device()) if torch.cuda.is_available() else ()
    m = row_class(rows)
    measured = gpu and tuned.lookup(gpu[0], tuned.key(format, dtype, m, shape, direction)) is not None
    plan = plan_for(format, dtype, m, shape, direction, *gpu)
    return f"{plan} ({'tuned' if measured else 'by the rule'})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _interpreted() -> bool:
    from .launch import interpreted

    return interpreted()
