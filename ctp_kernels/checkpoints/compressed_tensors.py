"""Layers as compressed-tensors checkpoints hold them (llm-compressor; read by transformers and vLLM).

`pack-quantized`, codes with the weight (N, K) in its own order:

    weight_packed      int32 (N, ceil(K b / 32))       codes, a bit string along K (see words.py); before June 2026
                                                       3 bits were padded, ten codes a word, under the same name
    weight_scale       float (N, groups), or (1,)
    weight_zero_point  int32 (ceil(N b / 32), groups)  zeros, a bit string along N; int8 in older files; or absent
    weight_g_idx       int32 (K,)                      the group of each input, where act-order leaves it unsorted; read
                                                       by versions before 0.20 only
    weight_shape       int64 (2,)                      N, K

Codes and zeros are signed numbers plus 2^(b-1), which is how our formats write them too. Older versions also wrote
floating weights with a bitmap, which is ours bit for bit:

    sparse-24-bitmask  compressed (N, K / 2), bitmask uint8 (N, ceil(K / 8)), shape
    sparse-bitmask     compressed (entries,), bitmask uint8 (N, ceil(K / 8)), row_offsets, shape
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CTPError
from ..format import Format
from ..packed import PackedWeight, pack_codes, pack_values
from ..patterns import bytes_to_mask
from .layer import Layer, Parts, dense_codes, group_order, stored_scales
from .words import codes_to_words, padded_to_codes, words_of, words_to_codes

METHOD = "compressed-tensors"
LAYOUTS = ("pack-quantized", "sparse-24-bitmask", "sparse-bitmask")
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape",
         "compressed", "bitmask", "row_offsets", "shape")  # fmt: skip
#: What in a tensor's name follows the name of a packed layer.
MARK = re.compile(r"\.weight_packed$|(\.weight)?\.bitmask$")


def check(config: Mapping[str, Any]) -> None:
    """Raise CTPError for a `quantization_config` of what is not read here: other layouts, quantised activations."""
    for layout in (config.get("format"), *(group.get("format") for group in _groups(config))):
        if layout not in (None, "dense", "mixed-precision", *LAYOUTS):
            raise CTPError(f"this checkpoint is laid out as {layout!r}; what is read: {', '.join(LAYOUTS)}")
    for group in _groups(config):
        weights = group.get("weights") or {}
        if weights.get("type", "int") != "int":
            raise CTPError(f"this checkpoint holds {weights.get('type')} codes; what is read: int, in pack-quantized")
        if group.get("input_activations") or group.get("output_activations") or config.get("kv_cache_scheme"):
            raise CTPError("this checkpoint quantises activations too; what is read: weights alone (pack-quantized)")
    if config.get("transform_config"):
        raise CTPError("this checkpoint transforms activations (transform_config), which is not read here")


def read_layer(parts: Parts, shape: tuple[int, int], config: Mapping[str, Any], dtype: torch.dtype) -> Layer:
    """The packed layer of shape (N, K) that the tensors `parts` hold, each code or value as it is.

    Raises CTPError where the tensors do not fit the shape or each other.
    """
    if "bitmask" in parts:
        return Layer(_read_bitmap(parts, shape))
    return _read_codes(parts, shape, config, dtype)


def write_layer(layer: Layer, symmetric: bool) -> dict[str, torch.Tensor]:
    """The tensors of a packed layer with codes, `pack-quantized`, bit for bit what `read_layer` reads back.

    A pruned entry is written as the code of its group's zero: exactly 0. `symmetric`: that no layer of the model has
    zeros, so that none is expected to. Raises CTPError for a weight without codes, and for inputs in an order of their
    own.
    """
    format, (n, k) = layer.weight.format, layer.weight.shape
    if layer.order is not None:
        raise CTPError(f"{METHOD} reads an order of inputs no more: write gptq")
    codes, zeros = dense_codes(layer.weight)
    tensors = {
        "weight_packed": codes_to_words(codes, format.bits),
        "weight_scale": layer.weight.buffers["scales"],
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = codes_to_words(zeros.T.contiguous(), format.bits).T.contiguous()
    return tensors


def quantization_config(format: Format, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model whose Linear layers, but those to `ignore`, `write_layer` wrote."""
    weights = {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": format.symmetric,
        "strategy": "channel" if format.group_size is None else "group",
        "group_size": format.group_size,
        "dynamic": False,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": "0.20.0",  # whose layout this is
    }


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups") or {}
    return [group for group in groups.values() if isinstance(group, Mapping)]


def _read_codes(parts: Parts, shape: tuple[int, int], config: Mapping[str, Any], dtype: torch.dtype) -> Layer:
    n, k = shape
    missing = [name for name in PARTS[:2] if name not in parts]
    if missing:
        raise CTPError(f"lacks the tensors {missing}")
    packed, scales = parts["weight_packed"], parts["weight_scale"]
    named = parts.get("weight_shape")
    if named is not None and named.tolist() != [n, k]:
        raise CTPError(f"its weight_shape says {named.tolist()}, and the layer is {shape}")
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[0] != n:
        raise CTPError(f"its weight_packed must be an int32 matrix of {n} rows")
    schemes = [group["weights"] for group in _groups(config) if group.get("weights")]
    fits = {
        (bits, padded)
        for bits in {scheme.get("num_bits") for scheme in schemes} & {2, 3, 4, 8}
        for padded in (False, True)
        if packed.shape[1] == (-(-k // (32 // bits)) if padded else words_of(k, bits))
        and not (padded and 32 % bits == 0)
    }
    if not fits:
        raise CTPError(
            f"its weight_packed {tuple(packed.shape)} holds no codes of 2, 3, 4 or 8 bits for a layer {shape}"
        )
    if len(fits) > 1 and len({bits for bits, _ in fits}) == 1:  # a few sizes fill as many words either way
        fits = {(bits, padded) for bits, padded in fits if padded == _pads(config)}
    if len(fits) > 1:
        raise CTPError(f"its weight_packed {tuple(packed.shape)} may hold codes of {sorted(b for b, _ in fits)} bits")
    bits, padded = next(iter(fits))
    unpack = padded_to_codes if padded else words_to_codes
    if scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(n, 1)
    groups = scales.shape[1] if scales.ndim == 2 else 0
    if tuple(scales.shape) != (n, groups) or not groups:
        raise CTPError(f"its weight_scale {tuple(scales.shape)} does not fit the layer {shape}")
    schemes = [scheme for scheme in schemes if scheme.get("num_bits") == bits]
    sizes = {size for scheme in schemes if (size := scheme.get("group_size") or 0) > 0 and -(-k // size) == groups}
    if len(sizes) > 1 and groups > 1:
        raise CTPError(f"its {groups} groups may hold {' or '.join(map(str, sorted(sizes)))} inputs")
    size, order = group_order(_index(parts), k, groups, min(sizes, default=None))
    codes = unpack(packed, bits, k)
    zeros = parts.get("weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int32:
        if tuple(zeros.shape) != (-(-n // (32 // bits)) if padded else words_of(n, bits), groups):
            raise CTPError(f"its weight_zero_point {tuple(zeros.shape)} does not fit {n} outputs in {groups} groups")
        zeros = unpack(zeros.T.contiguous(), bits, n).T
    elif zeros is not None:
        if zeros.dtype != torch.int8 or (zeros.numel() != 1 and tuple(zeros.shape) != (n, groups)):
            raise CTPError(f"its weight_zero_point, {zeros.dtype} {tuple(zeros.shape)}, does not fit the layer {shape}")
        zeros = zeros.reshape(-1, groups if zeros.numel() > 1 else 1).to(torch.int32).expand(n, groups) + 2 ** (
            bits - 1
        )
    elif not any(scheme.get("symmetric", True) for scheme in schemes):
        raise CTPError("lacks weight_zero_point, and its weights are not symmetric")
    if zeros is not None and bool((zeros == 2 ** (bits - 1)).all()):
        zeros = None
    if order is not None:
        codes = codes[:, order.long()]
    format = Format("dense", f"int{bits}", size, zeros is None)
    return Layer(pack_codes(codes, stored_scales(scales), zeros, format, dtype=dtype), order)


def _pads(config: Mapping[str, Any]) -> bool:
    """Whether the version that wrote a checkpoint padded codes of three bits. Raises CTPError where that is not known:
    0.11 did, 0.20 does not."""
    named = re.match(r"(\d+)\.(\d+)", str(config.get("version")))
    version = int(named[1]) * 1000 + int(named[2]) if named else 15
    if 11 < version < 20:
        raise CTPError(
            f"its codes may be padded or not: version {config.get('version')} of compressed-tensors wrote it"
        )
    return version <= 11


def _index(parts: Parts) -> torch.Tensor | None:
    """The group of each input, or None where inputs are in order: -1 throughout says so, too."""
    index = parts.get("weight_g_idx")
    return None if index is None or bool((index == -1).all()) else index


def _read_bitmap(parts: Parts, shape: tuple[int, int]) -> PackedWeight:
    n, k = shape
    values, bitmap = parts.get("compressed"), parts["bitmask"]
    if values is None:
        raise CTPError("lacks the tensors ['compressed']")
    if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != (n, -(-k // 8)):
        raise CTPError(f"its bitmask {tuple(bitmap.shape)} does not fit the layer {shape}")
    mask = bytes_to_mask(bitmap, k)
    if values.numel() != int(mask.sum()):
        raise CTPError(f"its bitmask marks {int(mask.sum())} entries, and it holds {values.numel()}")
    dense = torch.zeros(n, k, dtype=values.dtype)
    dense[mask] = values.reshape(-1)  # row by row, in the order of the inputs
    pattern = "sparse24" if k % 4 == 0 and bool((mask.view(n, k // 4, 4).sum(-1) == 2).all()) else "unstructured"
    return pack_values(dense, Format(pattern), mask)
