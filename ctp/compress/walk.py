"""Compress a model block by block: calibrate, solve, pack, go on with what the packed block puts out."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ctp.model import block_linears, decoder_blocks, sequential_groups
from ctp_kernels.errors import CTPError
from ctp_kernels.files import write_text
from ctp_kernels.format import Format, as_format
from ctp_kernels.linear import PackedLinear
from ctp_kernels.packed import PackedWeight

from .activations import Activations
from .hessian import true_fp32
from .resume import Finished
from .solver import NEEDS_INPUTS, check_options, solve


@dataclass(frozen=True)
class LayerRow:
    """One line of the error table.

    relative_error  |(W - W')x|^2 / |Wx|^2 over the calibration inputs (`error_of` "outputs"), W the weight as it was;
                    without windows |W - W'|^2 / |W|^2 (`error_of` "weights")
    sparsity        share of entries not stored; damping: share of the mean diagonal that the Cholesky took
    """

    layer: str
    format: str
    method: str
    N: int
    K: int
    bits_per_weight: float
    relative_error: float
    error_of: str
    sparsity: float
    damping: float
    seconds: float


@dataclass
class CompressReport:
    """What `compress_model` did; `resumed` blocks were taken from the work folder."""

    format: str
    method: str
    rows: list[LayerRow] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    resumed: int = 0
    seconds: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """Over all compressed layers, scales, zeros and masks included."""
        weights = sum(row.N * row.K for row in self.rows)
        return sum(row.bits_per_weight * row.N * row.K for row in self.rows) / weights

    @property
    def relative_error(self) -> float:
        """The mean of the layers'."""
        return sum(row.relative_error for row in self.rows) / len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"bits_per_weight": self.bits_per_weight, "relative_error": self.relative_error, **asdict(self)}

    def write_csv(self, path: str | Path) -> None:
        table = io.StringIO()
        writer = csv.DictWriter(table, [f.name for f in fields(LayerRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        write_text(path, table.getvalue())

    def __str__(self) -> str:
        worst = max(self.rows, key=lambda row: row.relative_error)
        return (
            f"{len(self.rows)} layers to {self.format} by {self.method}: {self.bits_per_weight:.2f} bits a weight, "
            f"mean relative error {self.relative_error:.4f} (worst {worst.relative_error:.4f}, {worst.layer}), "
            f"{self.seconds:.1f} s"
        )


@torch.no_grad()
def compress_model(
    model: PreTrainedModel,
    windows: torch.Tensor | None,
    format: str | Format,
    *,
    method: str = "gptq",
    sparsity: float = 0.5,
    skip: Sequence[str] = (),
    act_order: bool = True,
    true_sequential: bool = True,
    block_size: int = 128,
    percdamp: float = 0.01,
    mse: bool = False,
    mask_scope: str | None = None,
    batch_size: int = 8,
    csv_path: str | Path | None = None,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> CompressReport:
    """Replace every linear of the model's blocks, in place, by a PackedLinear. Embeddings and the head stay dense.

    windows          int64 (count, length) token ids; may be None for rtn and magnitude
    method, sparsity, act_order, block_size, percdamp, mse, mask_scope: see `solve`
    skip             layers to leave dense: a full name, a last part (`down_proj`) or a pattern (`*.3.mlp.*`)
    true_sequential  o_proj is solved for what the compressed q, k, v feed it, and so on inside a block (GPTQ); else all
                     linears of a block for what the dense block feeds them
    batch_size       windows per forward pass
    csv_path         where the error table goes
    work_dir         finished blocks are kept there; the same call goes on after the last of them, with the same result

    Beyond the model this holds the activations of all windows at one block, and the Hessians of one group of linears
    (without `true_sequential` those of one block). A call that fails leaves the blocks before it compressed.
    Raises CTPError for options, shapes, windows or weights that do not fit, before anything is changed where that can
    be known, and naming the layer.
    """
    began = time.perf_counter()
    format = as_format(format)
    check_options(format, method, sparsity, block_size, percdamp, mask_scope)
    blocks = decoder_blocks(model)
    skipped = _check_layers(blocks, format, skip)
    if windows is None and method in NEEDS_INPUTS:
        raise CTPError(f"{method} needs calibration windows; rtn and magnitude do without")
    options: dict[str, Any] = dict(
        method=method, sparsity=sparsity, act_order=act_order, block_size=block_size, percdamp=percdamp, mse=mse,
        mask_scope=mask_scope,
    )  # fmt: skip
    finished = None
    if work_dir is not None:
        settings = dict(options, format=str(format), skip=list(skip), true_sequential=true_sequential, batch=batch_size)
        finished = Finished(work_dir, model, windows, settings)
    report = CompressReport(str(format), method, skipped=skipped)
    stream = None if windows is None else Activations(model, blocks, windows, batch_size)

    with true_fp32(), tqdm(blocks, unit="block", disable=None if progress else True) as bar:
        for index, (block_name, block) in enumerate(bar):
            names = [n for n in block_linears(block) if f"{block_name}.{n}" not in skipped]
            solved = finished.load(index) if finished else None
            if solved is not None:
                packed = {name: weight.to(model.device) for name, weight in solved[0].items()}
                rows = [LayerRow(**row) for row in solved[1]]
                report.resumed += 1
                for name, weight in packed.items():
                    _set_weight(block, name, weight)
            else:
                packed, rows = {}, []
                groups = [[n for n in group if n in names] for group in sequential_groups(block)]
                groups = [group for group in groups if group]
                for stage in [[g] for g in groups] if true_sequential else [groups]:
                    hessians = [None] * len(stage) if stream is None else stream.hessians(index, stage)
                    for group, hessian in zip(stage, hessians, strict=True):
                        for name in group:
                            bar.set_postfix_str(f"{block_name}.{name}", refresh=True)
                            packed[name], row = _solve_layer(block, block_name, name, hessian, format, options)
                            rows.append(row)
                if finished:
                    finished.save(index, packed, [asdict(row) for row in rows])
            report.rows += rows
            if stream is not None:
                stream.advance(index)
            for name, weight in packed.items():
                parent, _, leaf = name.rpartition(".")
                linear = block_linears(block)[name]
                setattr(block.get_submodule(parent), leaf, PackedLinear(weight, linear.bias))
    report.seconds = time.perf_counter() - began
    if csv_path is not None:
        report.write_csv(csv_path)
    return report


def _check_layers(blocks: list[tuple[str, nn.Module]], format: Format, skip: Sequence[str]) -> list[str]:
    """The full names that `skip` names. Raises CTPError for what can be known to be wrong before any work."""
    skipped, used, linears = [], set(), 0
    for block_name, block in blocks:
        for part, linear in block_linears(block).items():
            name = f"{block_name}.{part}"
            hits = [s for s in skip if name == s or name.endswith("." + s) or fnmatchcase(name, s)]
            used.update(hits)
            if hits:
                skipped.append(name)
                continue
            if isinstance(linear, PackedLinear):
                raise CTPError(f"{name} is packed already ({linear.format}): start from the dense model")
            if reason := format.constraint((linear.out_features, linear.in_features)):
                raise CTPError(f"{format} does not fit {name}: {reason}; choose another format or skip it")
            linears += 1
    if unused := [s for s in skip if s not in used and s != "lm_head"]:
        raise CTPError(f"skip names no linear layer of the blocks: {', '.join(unused)}")
    if not linears:
        raise CTPError("skip names every linear layer: nothing is left to compress")
    return skipped


def _solve_layer(
    block: nn.Module, block_name: str, name: str, hessian: torch.Tensor | None, format: Format, options: dict[str, Any]
) -> tuple[PackedWeight, LayerRow]:
    began = time.perf_counter()
    weight = block.get_submodule(name).weight
    full = f"{block_name}.{name}"
    assert isinstance(weight, torch.Tensor)
    try:
        solution = solve(weight, hessian, format, **options)
        packed = solution.pack(weight.dtype)
    except CTPError as error:
        raise CTPError(f"{full}: {error}") from error
    _set_weight(block, name, packed)
    row = LayerRow(
        layer=full, format=str(packed.format), method=options["method"], N=packed.shape[0], K=packed.shape[1],
        bits_per_weight=packed.bits_per_weight, relative_error=solution.error,
        error_of="weights" if hessian is None else "outputs", sparsity=solution.sparsity, damping=solution.damping,
        seconds=round(time.perf_counter() - began, 4),
    )  # fmt: skip
    return packed, row


def _set_weight(block: nn.Module, name: str, packed: PackedWeight) -> None:
    """Let the dense layer compute what the packed one stands for, at its own speed, until the block is done."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    linear.weight.data = packed.unpack()
