"""The second moment of a layer's inputs, and the factor of its inverse that the sweep walks along."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ctp_kernels.errors import CTPError

log = logging.getLogger(__name__)

#: The Cholesky fails for good when even this share of the mean diagonal does not help.
LARGEST_DAMPING = 100.0


class Hessian:
    """H = 2/M sum x x^T over the M input rows seen (GPTQ section 3; the scale cancels in the solution).

    Sums fp32 products of whole batches in fp64 where the device has it, so late batches are not rounded away.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.total, self.rows = torch.zeros(k, k, dtype=wide, device=device), 0

    def add(self, x: torch.Tensor) -> None:
        """x (..., K), any float dtype."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.total += x.T @ x
        self.rows += x.shape[0]

    def mean(self) -> torch.Tensor:
        """H, fp32 (K, K). Raises CTPError where an input was NaN or infinite, or none came."""
        if not self.rows or not torch.isfinite(self.total).all():
            raise CTPError("its inputs hold NaN or infinite values: load the model in fp32, or check its weights")
        return (self.total * (2 / self.rows)).float()


def inverse_factor(hessian: torch.Tensor, percdamp: float) -> tuple[torch.Tensor, float]:
    """The upper triangular U with U^T U = (H + damping * mean(diag H) * I)^-1, and the damping that it took.

    H fp32 (K, K) without zeros on its diagonal. When the Cholesky fails the damping grows tenfold, which is logged.
    Written backwards, H = R R^T with R upper triangular, the factor is R^-1: one Cholesky and one triangular solve
    in place of the published Cholesky, inverse, Cholesky.
    Raises CTPError when no damping up to `LARGEST_DAMPING` makes H positive definite.
    """
    k, damping = hessian.shape[0], percdamp
    unit = hessian.diagonal().mean()
    eye = torch.eye(k, device=hessian.device)
    while damping <= LARGEST_DAMPING:
        lower, info = torch.linalg.cholesky_ex((hessian + damping * unit * eye).flip(0, 1))
        if int(info) == 0:
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            if torch.isfinite(factor).all():
                return factor, damping
        grown = max(damping * 10, 1e-4)
        log.warning("Cholesky failed with damping %g of the mean diagonal (K = %d): trying %g", damping, k, grown)
        damping = grown
    raise CTPError(f"its Hessian is not positive definite even with damping {LARGEST_DAMPING:g}: use other windows")


@contextmanager
def true_fp32() -> Iterator[None]:
    """fp32 products in full precision (no TF32, no bf16 passes), whatever the process has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
