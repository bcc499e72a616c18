"""The package's own checkpoint: a Hugging Face folder whose packed layers are described by `ctp_manifest.json`.

    config.json, tokenizer files      as transformers writes them
    model.safetensors                 dense tensors under their own names, packed ones as <layer>.<buffer>
    ctp_manifest.json                 {"version": 1, "layers": {name: {"format", "shape", "dtype"}},
                                       "tied": {name: name}, "files": {file: {"bytes", "sha256"}}, "info": {...}}

Nothing in it is trusted: sizes and hashes are compared before a file is parsed, and every buffer is checked by
`PackedWeight.validate` before a kernel sees it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CTPError
from ..files import staged_folder, write_json
from ..format import FLOAT_DTYPES, parse_format
from ..linear import PackedLinear
from ..memory import in_huge_pages
from ..packed import PackedWeight

MANIFEST = "ctp_manifest.json"
WEIGHTS = "model.safetensors"
VERSION = 1

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*FLOAT_DTYPES.values(), torch.float64)}


def save_packed(model: nn.Module, folder: str | Path, *, tokenizer: Any = None, info: dict | None = None) -> None:
    """Write a patched transformers model (and its tokenizer) to `folder`, as a whole or not at all.

    `info` is kept in the manifest: how the model was made. Raises CTPError when the model has no packed layer.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    if not layers:
        raise CTPError(f"{type(model).__name__} holds no packed layer: call patch_model before saving")
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    with staged_folder(folder, MANIFEST) as staging:
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        model.config.save_pretrained(staging)  # type: ignore[union-attr, operator]
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(staging.iterdir())
            if path.is_file()
        }
        described = {
            name: {"format": layer.format.name, "shape": list(layer.packed.shape), "dtype": _dtype_name(layer.dtype)}
            for name, layer in layers.items()
        }
        write_json(
            staging / MANIFEST,
            {"version": VERSION, "layers": described, "tied": tied, "files": files, "info": info or {}},
        )


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a packed checkpoint, its fields checked. Raises CTPError naming what is wrong."""
    path = Path(folder) / MANIFEST
    if not Path(folder).is_dir():
        raise CTPError(f"there is no folder {folder}")
    if not path.is_file():
        raise CTPError(f"{folder} is not a packed checkpoint (no {MANIFEST}): make one with ctp compress")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CTPError(f"{path} is not valid JSON ({error}): the checkpoint is damaged") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        found = manifest.get("version") if isinstance(manifest, dict) else None
        raise CTPError(f"{path} has version {found!r}, this package reads version {VERSION}")
    for key in ("layers", "tied", "files", "info"):
        if not isinstance(manifest.get(key), dict):
            raise CTPError(f"{path} lacks the field {key!r}: the checkpoint is damaged")
    for name, layer in manifest["layers"].items():
        shape = layer.get("shape") if isinstance(layer, dict) else None
        sound = (
            isinstance(shape, list)
            and len(shape) == 2
            and all(isinstance(d, int) and 0 < d < 2**31 for d in shape)
            and isinstance(layer.get("format"), str)
            and isinstance(layer.get("dtype"), str)
            and layer["dtype"] in _DTYPES
        )
        if not sound:
            raise CTPError(f"{path} describes layer {name!r} wrongly: the checkpoint is damaged")
    sound = all(isinstance(source, str) for source in manifest["tied"].values())
    if not sound or not all(isinstance(file, dict) for file in manifest["files"].values()):
        raise CTPError(f"{path} describes its files or ties wrongly: the checkpoint is damaged")
    return manifest


def load_packed(folder: str | Path) -> nn.Module:
    """The transformers model of a packed checkpoint, on the CPU, in eval mode, with nothing trainable.

    Raises CTPError, naming the file or the tensor, for anything missing, unknown, truncated or altered.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_files(folder, manifest["files"])
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CTPError(f"{folder / WEIGHTS} cannot be read ({error}): the checkpoint is damaged") from error
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CTPError(f"{folder / 'config.json'} cannot be read ({error})") from error
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    for name, layer in manifest["layers"].items():
        _install(model, name, layer, tensors)
    for name, source in manifest["tied"].items():
        if source not in tensors:
            raise CTPError(f"{folder / WEIGHTS} lacks the tensor {source!r} that {name!r} is tied to")
        tensors[name] = tensors[source]
    try:
        result = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise CTPError(f"{folder / WEIGHTS} does not hold this model: {error}") from error
    if result.missing_keys or result.unexpected_keys:
        raise CTPError(
            f"{folder / WEIGHTS} does not hold this model: missing {result.missing_keys[:3] or 'nothing'}, "
            f"unknown {result.unexpected_keys[:3] or 'nothing'}"
        )
    if manifest["tied"]:  # a packed lm_head is tied no more, and tying would give it a dense weight again
        model.tie_weights()
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CTPError(f"tensor {name!r} of {folder / WEIGHTS} holds NaN or infinite values")
        parameter.requires_grad_(False)
    in_huge_pages(m._buffers for m in model.modules() if isinstance(m, PackedLinear))  # and not in the file
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _install(model: nn.Module, name: str, layer: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Put the packed layer in the place of the model's Linear of that name; its bias is loaded with the rest."""
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    n, k = layer["shape"]
    if not isinstance(linear, nn.Linear) or (linear.out_features, linear.in_features) != (n, k):
        raise CTPError(f"the manifest names a layer {name!r} of shape ({n}, {k}) that the model does not have")
    format = parse_format(layer["format"])
    missing = [b for b in format.buffer_names if f"{name}.{b}" not in tensors]
    if missing:
        raise CTPError(f"layer {name!r} ({format}) lacks the tensors {missing}: the checkpoint is damaged")
    buffers = {b: tensors[f"{name}.{b}"] for b in format.buffer_names}
    try:
        packed_layer = PackedLinear(PackedWeight(format, (n, k), _DTYPES[layer["dtype"]], buffers), linear.bias)
    except CTPError as error:
        raise CTPError(f"layer {name!r}: {error}") from error
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, packed_layer)


def _check_files(folder: Path, files: dict) -> None:
    if WEIGHTS not in files:
        raise CTPError(f"the manifest of {folder} does not list {WEIGHTS}: the checkpoint is damaged")
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CTPError(f"{folder} lacks the file {name!r} that its manifest lists")
        if path.stat().st_size != expected.get("bytes"):
            raise CTPError(
                f"{path} has {path.stat().st_size} bytes, not {expected.get('bytes')}: it is truncated or altered"
            )
        if _sha256(path) != expected.get("sha256"):
            raise CTPError(f"{path} was altered after it was saved (its SHA-256 differs from the manifest's)")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
