"""Load a packed model, whoever packed it: this package, GPTQ or compressed-tensors.

The layers of the other two are repacked code by code: nothing is rounded, and nothing dense is made.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

from ..errors import CTPError, first_line
from ..format import FLOAT_DTYPES
from ..linear import PackedLinear
from ..memory import in_huge_pages
from . import compressed_tensors, gptq
from .layer import WEIGHTS, Contents, Layer, read_tensors
from .manifest import MANIFEST, METHOD, packs_head, read_own, save_as_packed

_LAYOUTS: dict[str, Any] = {"gptq": gptq, "compressed-tensors": compressed_tensors}
INDEX = "model.safetensors.index.json"
#: Buffers that older versions of transformers wrote, and models now compute.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$")


def is_packed(config: Any) -> bool:
    """Whether the `quantization_config` of a transformers config is of a layout that `load_packed` reads."""
    return _method(config) in (METHOD, *_LAYOUTS)


def _method(config: Any) -> str | None:
    packing = getattr(config, "quantization_config", None) or {}
    method = packing.get("quant_method") if isinstance(packing, dict) else getattr(packing, "quant_method", None)
    return str(getattr(method, "value", method)) if isinstance(method, str) else None


def find_folder(name: str, **where: Any) -> Path:
    """The folder of a model by its path or hub name, fetched where it is on the hub. Raises CTPError for neither.

    `where`: the `revision` on the hub and the `cache_dir`, as for `huggingface_hub.snapshot_download`.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], **where))
    except (OSError, ValueError) as error:
        raise CTPError(
            f"cannot find the files of {name}, neither on disk nor on the hub: {first_line(error)}"
        ) from error


def repack(model: nn.Module) -> dict[str, PackedLinear]:
    """Packed layers for those of a model that transformers or GPTQModel loaded from GPTQ or compressed-tensors.

    By name, on the device of the layer that each may take the place of; the model stays as it is. Whatever the other
    library made of the weights in memory, codes are read from the files that it loaded. {} for any other model.
    Raises CTPError where those are not found, or hold other layers than the model.
    """
    if _method(getattr(model, "config", None)) not in _LAYOUTS:
        return {}
    name = str(model.config._name_or_path)  # type: ignore[union-attr]
    if not name:
        raise CTPError(f"{type(model).__name__} does not say which folder it was loaded from: use load_packed(folder)")
    folder = find_folder(name)
    packing = _written_packing(folder)
    loaded: Any = model.config.quantization_config  # type: ignore[union-attr]
    if packing is None:
        raise CTPError(f"{folder}, where the model was loaded from, holds no GPTQ or compressed-tensors checkpoint now")
    for key in ("bits", "group_size", "desc_act"):  # of another revision, maybe
        if isinstance(loaded, dict) and loaded.get(key) != packing.get(key):
            raise CTPError(f"{folder} holds another checkpoint than the model's ({key}): use load_packed(folder)")
    packed = {}
    for name, layer in _read_foreign(folder, packing, model).layers.items():
        module = model.get_submodule(name)
        if any(True for _ in module.children()):
            raise CTPError(f"{name} holds other layers (adapters?), which would be lost: take them out first")
        bias: Any = getattr(module, "bias", None)
        device = next(iter([*module.parameters(), *module.buffers(), *model.parameters()])).device
        packed[name] = PackedLinear(layer.weight, bias, order=layer.order).to(device)
    return packed


def forget_packing(model: nn.Module) -> None:
    """Take from a repacked model the signs by which transformers takes it for another library's."""
    for owner, names in ((model.config, ("quantization_config",)), (model, ("hf_quantizer", "quantization_method"))):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    model.is_quantized = False  # type: ignore[assignment]


def load_packed(folder: str | Path) -> nn.Module:
    """The transformers model of a packed checkpoint, on the CPU, in eval mode, with nothing trainable.

    `folder` holds a checkpoint of this package (by its ctp_manifest.json), of GPTQ, or of compressed-tensors (by the
    quantization_config in config.json).
    Raises CTPError, naming the file or the tensor, for anything missing, unknown, truncated or altered.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    own = read_own(folder) if (folder / MANIFEST).is_file() or not folder.is_dir() else None
    with _named(f"{folder / 'config.json'} cannot be used"):
        config = AutoConfig.from_pretrained(folder)
    packing = _written_packing(folder)
    if own is None and packing is None:
        raise CTPError(f"{folder} is not a packed checkpoint (no {MANIFEST}): make one with ctp compress")
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # of the files, not of the model
    with _named(f"{folder / 'config.json'} describes no language model"), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    contents = own or _read_foreign(folder, packing or {}, model)
    fill(model, contents, folder)
    in_huge_pages(m._buffers for m in model.modules() if isinstance(m, PackedLinear))  # and not in the file
    if (folder / "generation_config.json").is_file():
        with _named(f"{folder / 'generation_config.json'} cannot be used"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    save_as_packed(model)
    return model.eval()


def fill(model: nn.Module, contents: Contents, folder: Path) -> None:
    """Put packed layers, and every other tensor as it is stored, into a model whose parameters are on the meta device.

    Raises CTPError where the contents of `folder` are not all that the model needs, or more, or not finite.
    """
    for name, layer in contents.layers.items():
        _install(model, name, layer, contents.tensors)
    with _named(f"the files of {folder} do not hold this model"):
        result = model.load_state_dict(contents.tensors, strict=False, assign=True)
    if packs_head(model):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    elif contents.tied:
        model.tie_weights()  # type: ignore[operator]
    state = model.state_dict()
    missing = [name for name in result.missing_keys if state[name].is_meta]  # not what a packed layer brought
    if missing or result.unexpected_keys:
        raise CTPError(
            f"the files of {folder} do not hold this model: missing {missing[:3] or 'nothing'}, "
            f"unknown {result.unexpected_keys[:3] or 'nothing'}"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CTPError(f"tensor {name!r} of {folder} holds NaN or infinite values")
        parameter.requires_grad_(False)


def cast_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters, and what packed layers unpack to, in `dtype`; packed buffers keep the bytes they were stored with.

    Raises CTPError for a value that `dtype` cannot hold.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
            if not torch.isfinite(parameter).all():
                raise CTPError(f"{name} has values that {dtype} cannot hold: use bfloat16 or float32")
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.dtype = dtype
    model.config.dtype = dtype  # type: ignore[union-attr]


def _install(model: nn.Module, name: str, layer: Layer, tensors: dict[str, torch.Tensor]) -> None:
    """Put the packed layer in the place of the model's Linear of that name; its bias is loaded with the rest."""
    n, k = layer.weight.shape
    if _shape(model, name) != (n, k):
        raise CTPError(f"the checkpoint names a layer {name!r} of shape ({n}, {k}) that the model does not have")
    bias: Any = model.get_submodule(name).bias
    given = tensors.get(f"{name}.bias")
    if bias is None and given is not None:  # AutoGPTQ gives every layer one, of zeros where the model has none
        if given.shape != (n,):
            raise CTPError(f"tensor '{name}.bias' has shape {tuple(given.shape)}, and the layer {n} outputs")
        if not given.any():
            del tensors[f"{name}.bias"]
        else:
            bias = nn.Parameter(given, requires_grad=False)
    try:
        packed_layer = PackedLinear(layer.weight, bias, order=layer.order)
    except CTPError as error:
        raise CTPError(f"layer {name!r}: {error}") from error
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, packed_layer)


def _written_packing(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` in a folder's config.json, if it is of a layout that is read here."""
    try:
        packing = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        return packing if packing["quant_method"] in _LAYOUTS else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_foreign(folder: Path, config: dict[str, Any], model: nn.Module) -> Contents:
    """The contents of a GPTQ or compressed-tensors folder; the model tells which shape a layer has."""
    layout = _LAYOUTS[config["quant_method"]]
    with _named(f"the quantization_config of {folder} cannot be read"):
        layout.check(config)
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        held = read_tensors(path)
        if twice := tensors.keys() & held.keys():
            raise CTPError(f"{path} holds the tensor {min(twice)!r}, which another file holds, too")
        tensors |= held
    tensors = {name: tensor for name, tensor in tensors.items() if not _COMPUTED.search(name)}
    named: Any = model.config.dtype  # type: ignore[union-attr]
    dtype: torch.dtype = named if named in FLOAT_DTYPES.values() else torch.float16
    layers = {}
    for name in [layout.MARK.sub("", key) for key in tensors if layout.MARK.search(key)]:
        shape = _shape(model, name)
        if shape is None:
            raise CTPError(f"the checkpoint names a packed layer {name!r} that {type(model).__name__} does not have")
        keys = [(part, f"{name}.{prefix}{part}") for part in layout.PARTS for prefix in ("", "weight.")]
        parts = {part: tensors.pop(key) for part, key in keys if key in tensors}
        with _named(f"layer {name!r} of {folder}"):
            layers[name] = layout.read_layer(parts, shape, config, dtype)
    if not layers:
        raise CTPError(f"{folder} says that it is packed ({config['quant_method']}), but holds no packed layer")
    for name, tensor in tensors.items():  # as transformers does: a norm may be stored wider
        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return Contents(layers, tensors, bool(model.config.tie_word_embeddings))  # type: ignore[union-attr]


def describe_foreign(folder: Path) -> dict[str, Any] | None:
    """{"quantization_config", "layers": names of the packed ones, "files": {name: bytes}} of a GPTQ or
    compressed-tensors folder, from its configuration and the heads of its files; None for any other folder."""
    packing = _written_packing(folder)
    if packing is None:
        return None
    layout = _LAYOUTS[packing["quant_method"]]
    layers, files = [], {}
    for path in _weight_files(folder):
        files[path.name] = path.stat().st_size
        with _named(f"{path} cannot be read"), safe_open(path, "pt") as file:
            layers += [layout.MARK.sub("", key) for key in file.keys() if layout.MARK.search(key)]
    return {"quantization_config": packing, "layers": layers, "files": files}


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn whatever goes wrong inside, with somebody else's files, into one CTPError that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise CTPError(f"{what}: {first_line(error)}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, or the only one there is."""
    if not (folder / INDEX).is_file():
        found = sorted(folder.glob("*.safetensors"))
        if folder / WEIGHTS in found:
            return [folder / WEIGHTS]
        if len(found) != 1:
            raise CTPError(f"{folder} has {len(found)} safetensors files and no {INDEX}: it is not whole")
        return found
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CTPError(f"{folder / INDEX} cannot be read ({error}): the checkpoint is damaged") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise CTPError(f"{folder} lacks the file {name!r} that its index names")
    return [folder / name for name in sorted(names)]


def _shape(model: nn.Module, name: str) -> tuple[int, int] | None:
    """(N, K) of the model's layer of that name: a Linear, or what another library has put in its place."""
    try:
        found = model.get_submodule(name)
    except AttributeError:
        return None
    n, k = getattr(found, "out_features", None), getattr(found, "in_features", None)
    return (n, k) if isinstance(n, int) and isinstance(k, int) else None
