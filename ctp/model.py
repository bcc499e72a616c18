"""Load a model, and name its parts: one code path for LLaMA-shaped models and OPT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ctp_kernels.checkpoints import MANIFEST, cast_model, find_folder, is_packed, load_packed
from ctp_kernels.errors import CTPError, first_line
from ctp_kernels.format import FLOAT_DTYPES
from ctp_kernels.fuse import fuse
from ctp_kernels.linear import PackedLinear

EMBEDDED = {f"embedded:{name}": Path(__file__).parent / "demo" / name for name in ("llama", "opt")}
EMBEDDED["embedded"] = EMBEDDED["embedded:llama"]

#: The linears of a block by the last part of their name, in the order that data meets them. Those of one row read
#: the same input (so they share a Hessian); a row's input depends on the rows before it.
ROLES = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj", "out_proj"),
    ("gate_proj", "up_proj", "fc1"),
    ("down_proj", "fc2"),
)


def load_model(
    path: str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen model in eval mode, and its tokenizer.

    `path` is `embedded:llama` (or `embedded`), `embedded:opt`, a local folder or a hub name; a checkpoint of this
    package, of GPTQ or of compressed-tensors gives packed layers, with the codes it holds. Without `dtype` floating
    weights are fp32 on the CPU, and as stored elsewhere.
    On a GPU packed layers that read the same input run in one launch (`ctp_kernels.fuse`).
    Raises CTPError for a missing folder or hub model, one of another shape than LLaMA or OPT, damaged files, and values
    that `dtype` cannot hold.
    """
    name, folder = _locate(path)
    wanted = dtype or (torch.float32 if torch.device(device).type == "cpu" else None)
    model: Any = load_packed(folder) if folder is not None else _load_dense(name, wanted)
    decoder_blocks(model)
    if hasattr(model.get_input_embeddings(), "embed_scale"):  # Gemma
        raise CTPError(
            f"{type(model).__name__} scales its word embeddings, which a soft prompt would miss: it is no LLaMA"
        )
    if wanted is not None:
        cast_model(model, wanted)
    nn.Module.to(model, torch.device(device))
    if torch.device(device).type == "cuda":
        fuse(model)
    model.requires_grad_(False).eval()
    return model, _load_tokenizer(name)


def load_stored(path: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A packed model in the dtypes of its files, and its tokenizer. Raises CTPError for a model that is not packed."""
    name, folder = _locate(path)
    if folder is None:
        _load_dense(name, None)  # or says what is wrong with it
        raise CTPError(f"{path} holds no packed layer: pack it with ctp compress")
    return load_packed(folder), _load_tokenizer(name)


def stored_dtype(path: str) -> torch.dtype:
    """The float dtype of a dense checkpoint: what its config names, else what its weights are stored in."""
    name, _ = _locate(path)
    named: Any = AutoConfig.from_pretrained(name).dtype or _load_dense(name, None).dtype
    return named if named in FLOAT_DTYPES.values() else torch.float32


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks in order, with their full names. Raises CTPError where the model has none we know."""
    for name in ("model.layers", "model.decoder.layers"):
        try:
            layers = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(layers, nn.ModuleList) and len(layers) and len(sequential_groups(layers[0])) == len(ROLES):
            return [(f"{name}.{i}", block) for i, block in enumerate(layers)]
    raise CTPError(f"{type(model).__name__} is neither a LLaMA-shaped nor an OPT-shaped causal language model")


def block_linears(block: nn.Module) -> dict[str, nn.Linear | PackedLinear]:
    """The linears of a block, dense or packed, by name, in the order of `sequential_groups`."""
    names = [name for group in sequential_groups(block) for name in group]
    return {name: cast("nn.Linear | PackedLinear", block.get_submodule(name)) for name in names}


def sequential_groups(block: nn.Module) -> list[list[str]]:
    """The names of a block's linears, those with the same input together, in the order that data meets them.

    LLaMA: q, k, v | o | gate, up | down. OPT: q, k, v | out_proj | fc1 | fc2 (GPTQ's "true sequential" order).
    """
    rows: list[dict[str, str]] = [{} for _ in ROLES]
    for name, module in block.named_modules():
        if isinstance(module, (nn.Linear, PackedLinear)):
            role = name.rpartition(".")[2]
            row = next((i for i, roles in enumerate(ROLES) if role in roles), None)
            if row is None:
                raise CTPError(f"a block has a linear layer {name!r}, which neither LLaMA nor OPT has")
            rows[row][role] = name
    return [[found[role] for role in roles if role in found] for roles, found in zip(ROLES, rows, strict=True) if found]


def context_length(model: PreTrainedModel) -> int:
    """The longest window, in tokens, that the model has positions for."""
    return int(model.config.max_position_embeddings)


def embedding_width(model: PreTrainedModel) -> int:
    """The width of a word embedding, which is that of a soft prompt (OPT-350M's differs from its hidden size)."""
    return int(_embedding(model).shape[1])


def vocabulary_size(model: PreTrainedModel) -> int:
    """Token ids run from 0 to one less than this."""
    return int(_embedding(model).shape[0])


def _embedding(model: PreTrainedModel) -> torch.Tensor:
    return cast(torch.Tensor, model.get_input_embeddings().weight)


def _source(path: str) -> Path:
    """The folder of a name or path; one that does not exist stands for a hub name."""
    if path in EMBEDDED:
        if not (EMBEDDED[path] / "config.json").is_file():
            raise CTPError(f"{path} is not part of this installation: train it with python -m ctp.demo.train_models")
        return EMBEDDED[path]
    source = Path(path).expanduser()
    if source.is_dir():
        if not (source / "config.json").is_file() and not (source / MANIFEST).is_file():
            raise CTPError(f"{path} holds no config.json: it is not a model folder")
    elif source.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or source.exists():
        raise CTPError(f"{path} is not a folder: give a model folder, a hub name, or one of {', '.join(EMBEDDED)}")
    return source


def _locate(path: str) -> tuple[str, Path | None]:
    """What transformers calls a model; and the folder of a packed one, fetched from the hub where it lies there."""
    source = _source(path)
    name = str(source) if source.is_dir() else path
    if (source / MANIFEST).is_file():
        return name, source
    try:
        packed = is_packed(AutoConfig.from_pretrained(name))
    except Exception:
        packed = False  # loading it as a dense model says what is wrong
    return name, find_folder(name) if packed else None


def _load_dense(path: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """In `dtype`, or as stored."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CTPError(f"{path} holds a damaged file: {first_line(error)}") from error
    except OSError as error:
        raise CTPError(f"cannot load {path}, neither from disk nor from the hub: {first_line(error)}") from error
    except Exception as error:
        raise CTPError(f"{path} is no language model that transformers can load: {first_line(error)}") from error
    model, info = loaded
    if lacking := sorted(info["missing_keys"]):
        raise CTPError(f"{path} lacks {len(lacking)} weights of its model, {lacking[0]} first: the files are not whole")
    return model


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CTPError(f"{path} holds no tokenizer that transformers can load: {first_line(error)}") from error
