"""Write a packed model as other software reads it: GPTQ, compressed-tensors, or plain dense weights.

Codes, scales and zeros go over as they are. What has no codes (2:4 or unstructured floating weights) only goes over
dense: the layouts that kept a bitmap are read by no current version of their own library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import CTPError
from ..files import check_output, staged_folder, write_json
from ..format import Format
from ..linear import PackedLinear
from ..patch import unpatch_model
from . import compressed_tensors, gptq
from .layer import WEIGHTS, Layer
from .manifest import distinct_tensors, packs_head

#: Beside an exported model: where it came from; and the sign that this package may replace the folder.
RECORD = "ctp_export.json"
LAYOUTS = ("gptq", "compressed-tensors", "dense")


def export_model(
    model: nn.Module, folder: str | Path, to: str, *, tokenizer: Any = None, record: dict | None = None
) -> dict[str, Any]:
    """Write a patched transformers model to `folder` in the layout `to`, as a whole or not at all.

    `gptq` (`gptq_v2` where there are zeros) and `compressed-tensors` (`pack-quantized`) take models
    whose packed layers have codes, all of one width and group size; pruned entries become codes of exactly 0. `dense`
    takes any, and leaves `model` unpatched. Returns what `ctp_export.json` records: `record`, the layout and sizes.
    Raises CTPError, before anything is written, for a model that the layout cannot hold.
    """
    if to not in LAYOUTS:
        raise CTPError(f"no layout is called {to!r}: choose {', '.join(LAYOUTS)}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    if not layers or not hasattr(model, "config"):
        raise CTPError(f"{type(model).__name__} is no transformers model, or holds no packed layer, to export")
    check_output(folder, RECORD)
    untied = packs_head(model)
    if to == "dense":
        unpatch_model(model)
        parts, packing = {}, None
    else:
        parts, packing = _pack(model, layers, to)
    replaced = {f"{name}.{buffer}" for name, m in layers.items() for buffer in m._buffers} if packing else set()
    tensors = {name: tensor for name, tensor in distinct_tensors(model)[0].items() if name not in replaced} | parts
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    if packing:
        config["quantization_config"] = packing
    if untied:
        config["tie_word_embeddings"] = False
    result = {
        **(record or {}),
        "layout": packing.get("checkpoint_format", to) if packing else to,
        "layers": len(layers),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }
    with staged_folder(folder, RECORD) as staging:
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        write_json(staging / "config.json", config)
        if packing and to == "gptq":
            write_json(staging / "quantize_config.json", packing)  # where older readers look
        for part in (getattr(model, "generation_config", None), tokenizer):
            if part is not None:
                part.save_pretrained(staging)
        write_json(staging / RECORD, result)
    return result


def _pack(model: nn.Module, layers: dict[str, PackedLinear], to: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of the packed layers by their full names, and the `quantization_config`."""
    formats = {(m.format.values, m.format.group_size) for m in layers.values()}
    for name, m in layers.items():
        if not m.format.quantized:
            raise CTPError(f"{name} is {m.format}, which {to} has no codes for: export it as dense")
        if to != "gptq" and m.input_order is not None:
            raise CTPError(
                f"{name} has its inputs in an order of its own (act-order), which {to} reads no more: use gptq"
            )
        if to != "gptq" and m.in_features % (m.format.group_size or 1):
            raise CTPError(
                f"{name} has {m.in_features} inputs, and {to} asks for a multiple of the groups of {m.format}"
            )
    if len(formats) > 1:
        found = ", ".join(sorted({m.format.name for m in layers.values()}))
        raise CTPError(f"the layers differ in format ({found}), and {to} is written for models of one")
    packed = {
        name: Layer(m.packed.to("cpu"), None if m.input_order is None else m.input_order.cpu())
        for name, m in layers.items()
    }
    symmetric = all(m.format.symmetric for m in layers.values())
    format = Format("dense", *next(iter(formats)), symmetric)
    dense = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if to == "gptq":
        layout = gptq.layout_for(packed.values())
        written = {}
        for name, layer in packed.items():
            try:
                written[name] = gptq.write_layer(layer, layout)
            except CTPError as error:
                raise CTPError(f"layer {name!r} {error}") from error
        ordered = any(layer.order is not None for layer in packed.values())
        packing = gptq.quantization_config(format, layout, ordered, dense, packs_head(model))
    else:
        written = {name: compressed_tensors.write_layer(layer, symmetric) for name, layer in packed.items()}
        packing = compressed_tensors.quantization_config(format, dense)
    parts = {f"{name}.{part}": tensor for name, parts in written.items() for part, tensor in parts.items()}
    return parts, packing
