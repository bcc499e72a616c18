"""Layers as GPTQ checkpoints hold them (AutoGPTQ, GPTQModel; read by transformers, vLLM, exllama).

    qweight   int32 (ceil(K b / 32), N)        codes, a bit string along K (see words.py)
    qzeros    int32 (groups, ceil(N b / 32))   zeros, a bit string along N; `gptq` stores zero - 1, `gptq_v2` the zero
    scales    fp16  (groups, N)
    g_idx     int32 (K,)                       the group of each input; act-order ("desc_act") makes it unsorted

weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n]), g = g_idx[k]: the numbers of our formats, in another order, so
neither direction rounds anything. A zero of 0 has no place in `gptq`: its writers subtract 1 from whole words of 2, 4
or 8 bits, where a field of 0 borrows from the next, and from each field of 3 bits, and readers differ. Here it is read
as GPTQModel writes it, and written as `gptq_v2`. `gptq_p` differs from `gptq_v2` in 3 bits alone (see words.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import CTPError
from ..format import Format
from ..packed import pack_codes
from .layer import Layer, Parts, dense_codes, from_group_order, group_order, stored_scales
from .words import codes_to_words, planar_to_codes, words_of, words_to_codes

METHOD = "gptq"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
#: What in a tensor's name follows the name of a packed layer.
MARK = re.compile(r"\.qweight$")
#: Layouts of a checkpoint: what is added to a stored zero.
LAYOUTS = {"gptq": 1, "gptq_v2": 0, "gptq_p": 0}
_BITS = (2, 3, 4, 8)
#: Words with a 1 in every field.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def check(config: Mapping[str, Any]) -> str:
    """The layout that a `quantization_config` names. Raises CTPError for one that is not read here."""
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        layout = "marlin"
    if layout not in LAYOUTS:
        raise CTPError(f"this GPTQ checkpoint is laid out as {layout!r}; what is read: {', '.join(LAYOUTS)}")
    return layout


def read_layer(parts: Parts, shape: tuple[int, int], config: Mapping[str, Any], dtype: torch.dtype) -> Layer:
    """The packed layer of shape (N, K) that the tensors `parts` hold, each code as it is; `dtype`: of unpacked weights.

    Bits and groups are read off the tensors where they can be, for a checkpoint may give them layer by layer. Raises
    CTPError where the tensors do not fit the shape or each other, or leave open what they hold.
    """
    n, k = shape
    layout = check(config)
    missing = [name for name in PARTS[:3] if name not in parts]
    if missing:
        raise CTPError(f"lacks the tensors {missing}")
    qweight, qzeros, scales = (parts[name] for name in PARTS[:3])
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32 or qweight.ndim != 2 or qzeros.ndim != 2:
        raise CTPError("its qweight and qzeros must be int32 matrices")
    fits = [b for b in _BITS if qweight.shape == (words_of(k, b), n)]
    if not fits:
        raise CTPError(f"its qweight {tuple(qweight.shape)} holds no codes of 2, 3, 4 or 8 bits for a layer {shape}")
    if len(fits) > 1 and config.get("bits") not in fits:
        raise CTPError(f"its qweight {tuple(qweight.shape)} may hold codes of {fits} bits")
    bits: int = config["bits"] if len(fits) > 1 else fits[0]
    groups = qzeros.shape[0]
    if tuple(qzeros.shape) != (groups, words_of(n, bits)) or tuple(scales.shape) != (groups, n):
        raise CTPError(
            f"its qzeros {tuple(qzeros.shape)} and scales {tuple(scales.shape)} do not fit the layer {shape}"
        )
    if "g_idx" not in parts and (config.get("desc_act") or config.get("dynamic")):
        raise CTPError("lacks g_idx, without which its groups are not known (desc_act, or dynamic)")
    size, order = group_order(parts.get("g_idx"), k, groups, config.get("group_size"))
    if layout == "gptq_p" and bits == 3:  # of the other widths it is the plain string
        if k % 32 or n % 32:
            raise CTPError(f"its planar int3 needs multiples of 32, not a layer {shape}")
        codes = planar_to_codes(qweight.T.contiguous(), k)
        zeros = planar_to_codes(qzeros, n)
    else:
        codes = words_to_codes(qweight.T.contiguous(), bits, k)
        if bits != 3:
            qzeros = qzeros + LAYOUTS[layout] * _ONES[bits]
        zeros = words_to_codes(qzeros, bits, n)
        if bits == 3:
            zeros = (zeros + LAYOUTS[layout]) & 7
    symmetric = bool((zeros == 2 ** (bits - 1)).all())
    format = Format("dense", f"int{bits}", size, symmetric)
    scales = stored_scales(scales).T.contiguous()
    if order is not None:
        codes = codes[:, order.long()]
    return Layer(pack_codes(codes, scales, None if symmetric else zeros.T, format, dtype=dtype), order)


def layout_for(layers: Iterable[Layer]) -> str:
    """`gptq`, which all software reads, or `gptq_v2` where there are zeros: GPTQModel takes those of `gptq` from itself
    alone, as others wrote them wrongly."""
    return "gptq" if all(layer.weight.format.symmetric for layer in layers) else "gptq_v2"


def quantization_config(format: Format, layout: str, ordered: bool, dense: list[str], lm_head: bool) -> dict[str, Any]:
    """The `quantization_config` of a model of one format; `dense`: the full names of Linear layers left as they are."""
    return {
        "quant_method": METHOD,
        "bits": format.bits,
        "group_size": -1 if format.group_size is None else format.group_size,
        "desc_act": ordered,
        "sym": format.symmetric,
        "lm_head": lm_head,
        "checkpoint_format": layout,
        "pack_dtype": "int32",
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in dense if not name.endswith("lm_head")} or None,
        "meta": {"quantizer": ["ctp"]},
    }


def write_layer(layer: Layer, layout: str) -> dict[str, torch.Tensor]:
    """The tensors of a packed layer with codes, bit for bit what `read_layer` reads back.

    A pruned entry is written as the code of its group's zero: exactly 0. Raises CTPError for a weight without codes,
    scales that fp16 does not hold, and a zero that `layout` does not.
    """
    format, (_, k) = layer.weight.format, layer.weight.shape
    codes, zeros = dense_codes(layer.weight)
    if LAYOUTS[layout] and bool((zeros == 0).any()):
        raise CTPError(f"{layout} has no zero of 0: write gptq_v2")
    scales = layer.weight.buffers["scales"]
    if scales.dtype != torch.float16:
        raise CTPError("has scales that fp16 cannot hold, which GPTQ's readers expect")
    group = torch.arange(k, dtype=torch.int32) // (format.group_size or k)
    stored = (zeros - LAYOUTS[layout]).T.contiguous()
    return {
        "qweight": codes_to_words(from_group_order(codes, layer.order), format.bits).T.contiguous(),
        "qzeros": codes_to_words(stored, format.bits),
        "scales": scales.T.contiguous(),
        "g_idx": from_group_order(group, layer.order),
    }
