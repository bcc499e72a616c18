"""One solver: which entries of a weight stay, and how each is written.

    method                    mask from               rounding
    rtn                       (prunes nothing)        nearest
    magnitude                 |w|                     nearest
    wanda                     |w| * |x|               nearest
    gptq, sparsegpt           w^2 / u^2               nearest, its error pushed into the inputs still to come

`gptq` and `sparsegpt` are two names of one sweep, in which the format decides what happens: dense codes make it GPTQ,
a sparse pattern with floating values SparseGPT, both together the joint method: the mask of a block is chosen, the
kept weights are rounded, and the error of both goes right.

Sources: GPTQ (Frantar et al., ICLR 2023, algorithm 1), SparseGPT (Frantar and Alistarh, ICML 2023, algorithm 1),
Wanda (Sun et al., ICLR 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ctp_kernels.errors import CTPError
from ctp_kernels.format import FLOAT_DTYPES, Format, as_format
from ctp_kernels.packed import PackedWeight, pack_codes, pack_values
from ctp_kernels.patterns import magnitude24
from ctp_kernels.values import dequantize, quantize

from .grid import fit_grid, row_grid
from .hessian import inverse_factor, true_fp32

METHODS = ("rtn", "magnitude", "wanda", "gptq", "sparsegpt")
SWEEPS = ("gptq", "sparsegpt")
NEEDS_INPUTS = ("wanda", *SWEEPS)
#: Inputs whose mask the sweep chooses at once: narrower is better down to here (docs/compression.md).
STEP = 8


@dataclass
class Solution:
    """What the solver decided for one weight (N, K).

    `stored` holds uint8 codes, or values in the dtype they are stored in; entries outside `mask` (bool, None for
    dense) are 0. `scales` and `zeros` as in `pack_codes`. `error` is tr(D H D^T) / tr(W H W^T), D what was lost: the
    squared output error over the squared output (without a Hessian, of the weights). `damping` is a share of the mean
    diagonal, 0 where no sweep was run.
    """

    format: Format
    stored: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    mask: torch.Tensor | None
    error: float = 0.0
    damping: float = 0.0

    @property
    def sparsity(self) -> float:
        """The share of entries that are not stored."""
        return 0.0 if self.mask is None else 1 - float(self.mask.float().mean())

    def dense(self) -> torch.Tensor:
        """The weight that the format stands for, fp32 (N, K)."""
        if self.scales is None:
            return self.stored.float()
        dense = dequantize(self.stored, self.scales, self.zeros, self.format)
        return dense if self.mask is None else torch.where(self.mask, dense, 0.0)

    def pack(self, dtype: torch.dtype) -> PackedWeight:
        """The packed bytes; `dtype` is what they unpack to."""
        if self.scales is None:
            return replace(pack_values(self.stored, self.format, self.mask), dtype=dtype)
        return pack_codes(self.stored, self.scales, self.zeros, self.format, self.mask, dtype)


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    format: Format | str,
    *,
    method: str = "gptq",
    sparsity: float = 0.5,
    act_order: bool = True,
    block_size: int = 128,
    percdamp: float = 0.01,
    mse: bool = False,
    mask_scope: str | None = None,
) -> Solution:
    """Compress one weight (N, K) of any float dtype; hessian fp32 (K, K) = 2/M sum x x^T, None for rtn and magnitude.

    sparsity    share of entries to prune, for `unstructured`
    act_order   take inputs in falling order of diag(H), on grids fixed beforehand from the weights as given, so that
                groups stay where they are (static groups); else each grid is fitted when the sweep reaches its group.
                Quads of 2:4 move as one. Not for `unstructured` floating values, which it makes worse.
    block_size  inputs between two updates of the rest, a multiple of 8
    percdamp    damping, as a share of the mean diagonal
    mse         search the range of each grid (see `grid.py`)
    mask_scope  what `unstructured` compares scores over: the whole weight (`layer`) or each row by itself (`row`); the
                sweep then takes from every 8 inputs as many entries as that comparison of the untouched weights says,
                and chooses them on arrival. `block` is SparseGPT as published: the same share of every N x block_size.
                None: `row` for wanda (as published), else `layer`. docs/compression.md compares them.

    Raises CTPError for options or shapes that do not fit, for a weight that is not finite, and for one with values that
    the format cannot hold.
    """
    format = as_format(format).with_dtype(weight.dtype)
    check_options(format, method, sparsity, block_size, percdamp, mask_scope)
    n, k = weight.shape
    if reason := format.constraint((n, k)):
        raise CTPError(f"{format} does not fit: {reason}")
    if not torch.isfinite(weight).all():
        raise CTPError("its weight holds NaN or infinite values: the checkpoint is damaged")
    if hessian is None and method in NEEDS_INPUTS:
        raise CTPError(f"{method} needs calibration windows; rtn and magnitude do without")
    scope = mask_scope or ("row" if method == "wanda" else "layer")
    original, dead = weight.detach().float(), None
    if hessian is not None:
        hessian = hessian.float()
        if not torch.isfinite(hessian).all():
            raise CTPError("its Hessian holds NaN or infinite values: load the model in fp32")
        dead = hessian.diagonal() == 0
    with true_fp32():
        if method in SWEEPS:
            assert hessian is not None and dead is not None
            start = original.masked_fill(dead, 0.0)
            live = hessian + torch.diag(dead.float())
            solution = _sweep(start, live, format, sparsity, act_order, block_size, percdamp, mse, scope)
        else:
            mask = None
            if format.pattern != "dense":
                norms = hessian.diagonal().sqrt() if method == "wanda" and hessian is not None else 1.0
                mask = choose_mask(original.abs() * norms, format, sparsity, scope)
            solution = _nearest(original, mask, format, mse)
        if not format.quantized and not torch.isfinite(solution.stored).all():
            raise CTPError(f"its weight has values that {format} cannot hold: use bf16 or fp32 values")
        solution.error = relative_error(original, solution.dense(), hessian)
    return solution


def check_options(
    format: Format, method: str, sparsity: float, block_size: int, percdamp: float, mask_scope: str | None
) -> None:
    """Raise CTPError for options that no weight could be solved with."""
    if method not in METHODS:
        raise CTPError(f"unknown method {method!r}: one of {', '.join(METHODS)}")
    if method == "rtn" and format.pattern != "dense":
        raise CTPError(f"rtn only rounds, and {format} prunes: use magnitude, wanda or sparsegpt")
    if method in ("magnitude", "wanda") and format.pattern == "dense":
        raise CTPError(f"{method} prunes, and {format} keeps every weight: use rtn or gptq")
    if not 0 <= sparsity < 1:
        raise CTPError(f"sparsity {sparsity} is not in [0, 1)")
    if block_size < STEP or block_size % STEP:
        raise CTPError(f"block size {block_size} is not a positive multiple of {STEP}")
    if not percdamp >= 0:
        raise CTPError(f"damping {percdamp} is negative")
    if mask_scope not in (None, "layer", "block", "row"):
        raise CTPError(f"unknown mask scope {mask_scope!r}: layer, block or row")


def choose_mask(score: torch.Tensor, format: Format, sparsity: float, scope: str) -> torch.Tensor:
    """bool (N, K), True where a weight stays: the highest of the (N, K) scores under a sparse pattern.

    Exactly round(sparsity * count) entries go, of equals the first; two of every four for sparse24.
    """
    if format.pattern == "sparse24":
        return magnitude24(score.contiguous())
    return _highest(score, round(sparsity * (score.shape[1] if scope == "row" else score.numel())), scope)


def _highest(score: torch.Tensor, goes: int | torch.Tensor, scope: str) -> torch.Tensor:
    """bool (N, K): all but the `goes` lowest scores, of all, or for scope `row` of each row (then also (N, 1))."""
    rows = score if scope == "row" else score.reshape(1, -1)
    rank = torch.empty(rows.shape, dtype=torch.long, device=rows.device)
    rank.scatter_(1, rows.argsort(dim=1, stable=True), torch.arange(rows.shape[1], device=rows.device).expand_as(rank))
    return (rank >= goes).view(score.shape)


def relative_error(weight: torch.Tensor, dense: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = weight - dense; without a Hessian |D|^2 / |W|^2. 0 for an output of zeros."""
    lost = weight - dense
    before = (weight if hessian is None else weight @ hessian) * weight
    after = (lost if hessian is None else lost @ hessian) * lost
    whole = float(before.sum(dtype=torch.float32 if weight.device.type == "mps" else torch.float64))
    return float(after.sum()) / whole if whole > 0 else 0.0


def _nearest(weight: torch.Tensor, mask: torch.Tensor | None, format: Format, mse: bool) -> Solution:
    """The kept entries of an fp32 weight, each written as the nearest value its grid has."""
    kept = weight if mask is None else torch.where(mask, weight, 0.0)
    if not format.quantized:
        return Solution(format, kept.to(FLOAT_DTYPES[str(format.values)]), None, None, mask)
    scales, zeros = fit_grid(kept, format, mse)
    codes = quantize(kept, scales, zeros, format)
    return Solution(format, codes if mask is None else codes * mask, scales, zeros, mask)


def _sweep(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    format: Format,
    sparsity: float,
    act_order: bool,
    block_size: int,
    percdamp: float,
    mse: bool,
    scope: str,
) -> Solution:
    """Prune, round, or both, input by input, each error pushed into the inputs still to come.

    weight fp32 (N, K); hessian fp32 (K, K) without zeros on its diagonal. U is the factor of its inverse: what input j
    loses, over U[j, j], times row j of U, is taken from the inputs after it. Inside a block at once, beyond it when
    the block is done (one product instead of `block_size` thin ones).
    """
    n, k = weight.shape
    act_order = act_order and (format.quantized or format.pattern == "sparse24")
    order = _order(hessian.diagonal(), format) if act_order else torch.arange(k, device=weight.device)
    back, inputs = order.argsort(), order.tolist()
    factor, damping = inverse_factor(hessian[order][:, order], percdamp)
    u = factor.diagonal()[:, None]
    rest = weight.T[order].contiguous()  # (K, N): the inputs of all rows side by side, in the order of the sweep
    store = torch.uint8 if format.quantized else FLOAT_DTYPES[str(format.values)]
    stored = torch.zeros(k, n, dtype=store, device=weight.device)
    mask = torch.ones(k, n, dtype=torch.bool, device=weight.device)
    size, cut = format.group_size or k, row_grid(format)
    grids: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    if act_order and format.quantized:
        scales, zeros = fit_grid(weight, format, mse)
        grids = [(scales[:, g, None], None if zeros is None else zeros[:, g, None]) for g in range(format.groups(k))]
    step, budgets = 4 if format.pattern == "sparse24" else block_size, []
    if format.pattern == "unstructured" and scope != "block":
        step = STEP
        goes = ~choose_mask((rest / u).square().T, format, sparsity, scope).T
        budgets = [part.sum(0)[:, None] if scope == "row" else part.sum() for part in goes.split(STEP)]

    for first, last in _blocks(k, size if format.quantized and not act_order else k, block_size):
        lost = torch.empty(last - first, n, device=weight.device)
        for j in range(first, last):
            if format.pattern != "dense" and (j - first) % step == 0:
                end = min(j + step, last)
                score = (rest[j:end] / u[j:end]).square().T.contiguous()
                if budgets:
                    mask[j:end] = _highest(score, budgets[j // step], scope).T
                else:
                    mask[j:end] = choose_mask(score, format, sparsity, scope).T
            now = rest[j, :, None]
            if format.quantized:
                group = inputs[j] // size
                if group == len(grids):
                    grids.append(fit_grid(rest[j : j + size].T.contiguous(), cut, mse))
                scale, zero = grids[group]
                written = quantize(now, scale, zero, cut)
                value = dequantize(written, scale, zero, cut)
            else:
                written = now.to(store)
                value = written.float()
            stored[j] = torch.where(mask[j], written[:, 0], 0)
            lost[j - first] = (rest[j] - torch.where(mask[j], value[:, 0], 0.0)) / u[j]
            rest[j + 1 : last].addr_(factor[j, j + 1 : last], lost[j - first], alpha=-1)
        rest[last:].addmm_(factor[first:last, last:].T, lost, alpha=-1)

    scales = zeros = None
    if grids:
        scales = torch.cat([s for s, _ in grids], dim=1)
        zeros = None if format.symmetric else torch.cat([z for _, z in grids if z is not None], dim=1)
    kept = None if format.pattern == "dense" else mask[back].T.contiguous()
    return Solution(format, stored[back].T.contiguous(), scales, zeros, kept, damping=damping)


def _order(diagonal: torch.Tensor, format: Format) -> torch.Tensor:
    """Inputs by falling diag(H); those of one 2:4 quad stay together, by their sum."""
    if format.pattern != "sparse24":
        return diagonal.argsort(descending=True, stable=True)
    quads = diagonal.view(-1, 4).sum(1).argsort(descending=True, stable=True)
    return (quads[:, None] * 4 + torch.arange(4, device=diagonal.device)).flatten()


def _blocks(k: int, group: int, block_size: int) -> Iterator[tuple[int, int]]:
    """[first, last) of each block: whole groups, or whole parts of one, so that a grid is always fitted on weights
    that carry every error so far."""
    step = block_size // group * group or block_size
    for start in range(0, k, max(step, group)):
        stop = min(start + max(step, group), k)
        for first in range(start, stop, step):
            yield first, min(first + step, stop)
