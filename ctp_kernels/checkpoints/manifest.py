"""The package's own checkpoint: a Hugging Face folder whose packed layers are described by `ctp_manifest.json`.

    config.json, tokenizer files      as transformers writes them, with {"quant_method": "ctp_kernels"}
    ctp_model.safetensors             dense tensors under their own names, packed ones as <layer>.<buffer>,
                                      <layer>.input_order where a layer's inputs were sorted by group
    ctp_manifest.json                 {"version": 1, "layers": {name: {"format", "shape", "dtype"}},
                                       "tied": {name: name}, "files": {file: {"bytes", "sha256"}}, "info": {...}}

Nothing in it is trusted: sizes and hashes are compared before a file is parsed, and every buffer is checked by
`PackedWeight.validate` before a kernel sees it. `load.py` makes the model.

From a model.safetensors transformers would load what it knows, with random numbers in the packed layers and a warning.
It does not look for a ctp_model.safetensors, and raises, but through `transformers_plugin.py`. Folders written before,
with a model.safetensors, are read by `load_packed` alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import CTPError
from ..files import staged_folder, write_json
from ..format import FLOAT_DTYPES, parse_format
from ..linear import PackedLinear
from ..packed import PackedWeight
from .layer import WEIGHTS, Contents, Layer, read_tensors

MANIFEST = "ctp_manifest.json"
OWN_WEIGHTS = "ctp_model.safetensors"
#: The `quant_method` in config.json.
METHOD = "ctp_kernels"
VERSION = 1

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*FLOAT_DTYPES.values(), torch.float64)}


def save_packed(model: nn.Module, folder: str | Path, *, tokenizer: Any = None, info: dict | None = None) -> None:
    """Write a patched transformers model (and its tokenizer) to `folder`, as a whole or not at all.

    `info` is kept in the manifest: how the model was made. Raises CTPError when the model has no packed layer.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    if not layers:
        raise CTPError(f"{type(model).__name__} holds no packed layer: call patch_model before saving")
    tensors, tied = distinct_tensors(model)
    config: Any = copy.deepcopy(model.config)
    config.quantization_config = {"quant_method": METHOD}
    config.dtype = model.dtype  # or transformers takes that of the first tensor, which may be scales
    if packs_head(model):
        config.tie_word_embeddings = False
    with staged_folder(folder, MANIFEST) as staging:
        save_file(tensors, staging / OWN_WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(staging)
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


def save_as_packed(model: nn.Module) -> None:
    """Let the `save_pretrained` of a packed transformers model write what `save_packed` does.

    transformers' own would write a folder whose packed layers it could not read.
    """
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = partial(_save_pretrained, model)  # type: ignore[assignment]


def _save_pretrained(
    model: Any, save_directory: str | Path, is_main_process: bool = True, state_dict: Any = None, **options: Any
) -> None:
    """`save_packed` into a new or empty folder, by the main process; the weights are one file, whatever the options.

    Raises CTPError for a folder that holds files (transformers would leave those of a tokenizer there, and
    `save_packed` replaces a folder as a whole), and for `state_dict` and `push_to_hub=True`.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # its adapters alone are saved
        return type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **options)
    if state_dict is not None or options.get("push_to_hub"):
        raise CTPError("a packed model is saved without state_dict and push_to_hub: its folder can be uploaded then")
    folder = Path(save_directory)
    if folder.is_dir() and any(folder.iterdir()):
        raise CTPError(
            f"{folder} is not empty: choose a new folder, or let "
            "ctp_kernels.checkpoints.save_packed(model, folder, tokenizer=...) replace a packed one"
        )
    if is_main_process:
        save_packed(model, folder)


def packs_head(model: nn.Module) -> bool:
    """Whether the output layer is packed, and so tied to no embedding."""
    return isinstance(model.get_output_embeddings(), PackedLinear)  # type: ignore[operator]


def distinct_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a model's state, on the CPU, each under its first name; and that name by every other one."""
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
    return tensors, tied


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


def read_own(folder: Path) -> Contents:
    """What a folder with a manifest holds. Raises CTPError, naming the file, where one is missing or altered."""
    manifest = read_manifest(folder)
    weights = folder / (WEIGHTS if WEIGHTS in manifest["files"] else OWN_WEIGHTS)
    _check_files(folder, manifest["files"], weights.name)
    tensors = read_tensors(weights)
    layers = {name: _layer(name, described, tensors) for name, described in manifest["layers"].items()}
    for name, source in manifest["tied"].items():
        if source not in tensors:
            raise CTPError(f"{weights} lacks the tensor {source!r} that {name!r} is tied to")
        tensors[name] = tensors[source]
    return Contents(layers, tensors, bool(manifest["tied"]))


def _layer(name: str, described: dict, tensors: dict[str, torch.Tensor]) -> Layer:
    """The packed layer of that name, its tensors taken out."""
    format = parse_format(described["format"])
    missing = [b for b in format.buffer_names if f"{name}.{b}" not in tensors]
    if missing:
        raise CTPError(f"layer {name!r} ({format}) lacks the tensors {missing}: the checkpoint is damaged")
    n, k = described["shape"]
    buffers = {b: tensors.pop(f"{name}.{b}") for b in format.buffer_names}
    weight = PackedWeight(format, (n, k), _DTYPES[described["dtype"]], buffers)
    return Layer(weight, tensors.pop(f"{name}.input_order", None))


def check_sizes(folder: Path, files: dict) -> None:
    """Raise CTPError where a file of the manifest is missing, or has another size."""
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CTPError(f"{folder} lacks the file {name!r} that its manifest lists")
        if path.stat().st_size != expected.get("bytes"):
            raise CTPError(
                f"{path} has {path.stat().st_size} bytes, not {expected.get('bytes')}: it is truncated or altered"
            )


def _check_files(folder: Path, files: dict, weights: str) -> None:
    if weights not in files:
        raise CTPError(f"the manifest of {folder} does not list {weights}: the checkpoint is damaged")
    check_sizes(folder, files)
    for name, expected in files.items():
        path = folder / name
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
