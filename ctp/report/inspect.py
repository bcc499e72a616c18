"""What a folder holds, told from its manifest or its configuration alone; no weight is loaded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ctp.prompt import SoftPrompt
from ctp.prompt.soft import CONFIG
from ctp_kernels import parse_format
from ctp_kernels.checkpoints import MANIFEST, read_manifest
from ctp_kernels.checkpoints.load import describe_foreign
from ctp_kernels.checkpoints.manifest import check_sizes


def inspect_folder(folder: Path) -> dict[str, Any]:
    """{"kind": "model" | "prompt", ..., "text": lines for a person}. Raises CTPError for any other folder."""
    if (folder / CONFIG).is_file():
        return _prompt(folder)
    if not (folder / MANIFEST).is_file() and (foreign := describe_foreign(folder)) is not None:
        return _foreign(folder, foreign)
    manifest = read_manifest(folder)
    check_sizes(folder, manifest["files"])
    layers = manifest["layers"]
    formats = Counter(layer["format"] for layer in layers.values())
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers.values())
    lines = [f"packed model in {folder}: {len(layers)} packed layers, {weights:,} weights"]
    lines += [f"  {name:24} {count} layers   {_describe(name)}" for name, count in formats.items()]
    lines += [f"  {name:40} {tuple(layer['shape'])!s:16} {layer['format']}" for name, layer in layers.items()]
    lines += [f"  {name}: {entry['bytes']:,} bytes" for name, entry in manifest["files"].items()]
    lines += _facts(manifest["info"])
    return {"kind": "model", "weights": weights, **manifest, "text": "\n".join(lines)}


def _facts(info: dict[str, Any], indent: str = "  ") -> list[str]:
    """What a manifest records, a line each."""
    lines = []
    for key, value in info.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_facts(value, indent + "  ")]
        elif value is not None:
            lines.append(f"{indent}{key}: {f'{value:.6g}' if isinstance(value, float) else value}")
    return lines


def _describe(name: str) -> str:
    format = parse_format(name)
    if not format.quantized:
        return f"{format.pattern}, {format.values} values"
    group = f"groups of {format.group_size}" if format.group_size else "one scale a row"
    return f"{format.pattern}, {format.bits}-bit codes, {group}, {'symmetric' if format.symmetric else 'with zeros'}"


def _foreign(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of GPTQ or compressed-tensors."""
    config = found["quantization_config"]
    lines = [f"{config['quant_method']} checkpoint in {folder}: {len(found['layers'])} packed layers"]
    lines += [f"  {name}" for name in found["layers"]]
    lines += [f"  {name}: {size:,} bytes" for name, size in found["files"].items()]
    lines += [f"  {key}: {value}" for key, value in config.items()]
    return {"kind": "model", **found, "text": "\n".join(lines)}


def _prompt(folder: Path) -> dict[str, Any]:
    prompt = SoftPrompt.load(folder)
    tokens, width = prompt.embeddings.shape
    lines = [f"soft prompt in {folder}: {tokens} tokens of width {width}"]
    lines += _facts({key: value for key, value in prompt.info.items() if key != "history"})
    return {"kind": "prompt", "tokens": tokens, "width": width, "info": prompt.info, "text": "\n".join(lines)}
