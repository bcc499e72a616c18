"""Which kernel runs a packed weight: the one place that chooses, and says why.

A backend is a module with

    matmul(x (M, K), tensors, format, n, bias, compute) -> y (M, N)   y = x W^T + bias
    matmul_t(dy (M, N), tensors, format, k) -> dx (M, K)              dx = dy W
    unsupported(format, shape, dtype, device, direction, compute) -> the reason why it cannot, or None

and, where how it runs depends on the rows,

    describe(format, shape, dtype, rows, direction) -> how, for `explain`
    slower(format, rows, direction) -> the reason why another backend should run so many rows where it can, or None

and, where a call's own time shows,

    bind(tensors, format, n, k, compute) -> (x (..., K), bias) -> y (..., N)   `matmul` for one weight, for many calls

`tensors` come in the order of `format.kernel_names`; `direction` is "forward" or "backward"; `compute` is
one of COMPUTE, and "exact" for the backward.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType

import torch

from ..errors import CTPError
from ..format import Format

logger = logging.getLogger("ctp_kernels")

#: Tried in this order by "auto"; `reference` answers for everything and comes last.
BACKENDS = ("cpu", "cuda", "triton", "reference")


#: "int8" rounds activations to 8-bit integers per group on the way in (forward only, formats with codes only): as
#: ONNX Runtime's accuracy level 4 and ggml do. Its error: |y - exact| <= sum of |W| scale / 2, with
#: scale = max|x| / 127 of the input's group (`reference.round_activations` defines it).
COMPUTE = ("exact", "int8")


@cache
def load(name: str) -> ModuleType:
    """The backend module of that name."""
    if name not in BACKENDS:
        raise CTPError(f"unknown backend {name!r}: auto, {', '.join(BACKENDS)}")
    return importlib.import_module(f"{__name__}.{name}")


@dataclass(frozen=True)
class Choice:
    """The backend that was chosen, and why each one before it was not."""

    backend: str
    passed_over: tuple[tuple[str, str], ...]

    @property
    def why(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.passed_over)


def row_class(rows: int) -> int:
    """Row counts that are run alike: the next power of two."""
    return 1 << (max(rows, 1) - 1).bit_length()


@lru_cache(maxsize=4096)
def choose(
    format: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    direction: str,
    backend: str = "auto",
    compute: str = "exact",
    rows: int | None = None,
) -> Choice:
    """The backend for a (N, K) weight and activations of `dtype` on a device type ("cpu", "cuda").

    `rows`, a `row_class`: "auto" passes over a backend that is slower than the next for so many rows. Raises CTPError
    with the reason when a backend asked for by name cannot do it. With "auto", landing on `reference` (which decodes
    the whole weight at every call) is logged once per case.
    """
    if compute not in COMPUTE:
        raise CTPError(f"unknown compute {compute!r}: {' or '.join(COMPUTE)}")
    if compute == "int8" and not format.quantized:
        raise CTPError(f'compute="int8" multiplies codes, and {format} stores floating values: use compute="exact"')
    passed_over, slow = [], None
    for name in BACKENDS if backend == "auto" else (backend,):
        module = load(name)
        reason = module.unsupported(format, shape, dtype, torch.device(device), direction, compute)
        if reason is None and name == "reference" and slow is not None:
            return slow  # nothing but the reference would be left
        if reason is None and backend == "auto" and rows is not None and hasattr(module, "slower"):
            reason = module.slower(format, rows, direction)
            slow = Choice(name, tuple(passed_over)) if reason is not None else None
        if reason is None:
            choice = Choice(name, tuple(passed_over))
            if name == "reference" and backend == "auto":
                logger.warning(
                    "%s %s on %s %s runs on the slow reference backend (%s)",
                    format,
                    direction,
                    device,
                    dtype,
                    choice.why,
                )
            return choice
        passed_over.append((name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    raise CTPError(f"no backend can run {format} {direction} on {device} with {dtype} activations ({reasons})")
