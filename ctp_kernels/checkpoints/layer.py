"""One packed layer on its way from or to a file: what the layouts of GPTQ and compressed-tensors have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import CTPError
from ..packed import PackedWeight
from ..values import spread

#: The file in which transformers looks for a model's tensors.
WEIGHTS = "model.safetensors"
#: A layer's tensors by the names that a layout gives them.
Parts = Mapping[str, torch.Tensor]


class Layer(NamedTuple):
    """A weight (N, K), and `order` int32 (K,) where its inputs were sorted by group: input k of the weight is input
    order[k] of the layer."""

    weight: PackedWeight
    order: torch.Tensor | None = None


class Contents(NamedTuple):
    """What a checkpoint holds: packed layers by name, every other tensor by name, and whether some are tied."""

    layers: dict[str, Layer]
    tensors: dict[str, torch.Tensor]
    tied: bool


def group_order(
    g_idx: torch.Tensor | None, k: int, groups: int, named: Any = None
) -> tuple[int | None, torch.Tensor | None]:
    """The group size (None: one group a row) and, where groups are not runs of inputs, the order that makes them so.

    g_idx integers (K,): the group of each input, as GPTQ's act-order leaves it; None: runs of `named` inputs, the size
    that the configuration gives. Raises CTPError where `g_idx` names a group there is none of, or groups differ in
    size (but for a short last one, as in our formats).
    """
    named = named if isinstance(named, int) and named > 0 else None
    if groups == 1:  # named or not, whatever its index says
        return (named if named is not None and named >= k and named % 8 == 0 else None), None
    if g_idx is None:
        if named is not None and -(-k // named) == groups:
            return named, None
        if k % groups == 0:
            return k // groups, None
        raise CTPError(f"its {groups} groups do not fit {k} inputs in groups of {named}")
    if g_idx.is_floating_point() or tuple(g_idx.shape) != (k,):
        raise CTPError(f"its group index has shape {tuple(g_idx.shape)}, not ({k},) integers")
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise CTPError(f"its group index names groups outside [0, {groups})")
    order = torch.argsort(g_idx, stable=True)
    size = int((g_idx == 0).sum())
    if size == 0 or not torch.equal(g_idx[order].long(), torch.arange(k) // size):
        raise CTPError("its groups are not all of one size")
    identity = torch.equal(order, torch.arange(k))
    return size, None if identity else order.to(torch.int32)


def from_group_order(tensor: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Columns (..., K) of a weight whose inputs were sorted, as the layer's own inputs come."""
    if order is None:
        return tensor
    result = torch.empty_like(tensor)
    result[..., order.long()] = tensor
    return result


def dense_codes(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 (N, K) and zeros uint8 (N, groups); a pruned entry has its group's zero for a code, so it is 0.

    Raises CTPError for a weight of floating values.
    """
    format, (n, k) = weight.format, weight.shape
    if not format.quantized:
        raise CTPError(f"{format} has no codes")
    zeros = weight.buffers.get("zeros")
    if zeros is None:
        zeros = torch.full((n, format.groups(k)), 2 ** (format.bits - 1), dtype=torch.uint8)
    codes = weight.codes()
    if format.pattern != "dense":
        codes = torch.where(weight.mask(), codes, spread(zeros, k, format))
    return codes, zeros


def stored_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales in the dtype that packed weights keep them in: fp16 where it holds each exactly, else fp32.

    Raises CTPError for scales that are not finite floating numbers.
    """
    if not scales.is_floating_point() or not torch.isfinite(scales).all():
        raise CTPError("its scales are not finite floating numbers")
    wide, narrow = scales.float(), scales.half()
    return narrow if torch.equal(narrow.float(), wide) else wide


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises CTPError where it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CTPError(f"{path} cannot be read ({error}): the checkpoint is damaged") from error
