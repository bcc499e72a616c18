"""The steps of the main job from names to folders: what the command line and the demo share."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ctp_kernels import PackedLinear, __version__, as_format, explain
from ctp_kernels.checkpoints import read_manifest, save_packed
from ctp_kernels.checkpoints.manifest import MANIFEST
from ctp_kernels.errors import CTPError
from ctp_kernels.files import check_output
from ctp_kernels.fuse import fuse
from ctp_kernels.patch import Explanation

from .compress import CompressReport, compress_model
from .compress.solver import NEEDS_INPUTS
from .data import token_windows
from .model import cast_model, context_length, load_model, stored_dtype
from .prompt.soft import CONFIG
from .prompt.train import train_prompt


def compress_to_folder(
    model: str,
    output: str | Path,
    format: str,
    *,
    method: str = "auto",
    sparsity: float = 0.5,
    calibration: str = "embedded",
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    csv_path: Path | None = None,
    progress: bool = True,
    device: str = "cpu",
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Compress a model (folder, hub or embedded name) into a packed folder; returns what the manifest records.

    `method="auto"` is sparsegpt for a sparse pattern and gptq for a dense one. Finished blocks are kept in
    `.<output>.work` until the folder is written, so that the same call goes on after an interruption. The error
    table is `layers.csv` beside the weights (and at `csv_path`). `options` go to `compress_model`.

    What is not packed, and floating values of a format that names none, are stored in the checkpoint's own dtype,
    however wide the solver calculates. Raises CTPError for a value that it cannot hold, and where `output` holds a
    model that `overwrite` does not allow to be replaced.
    """
    began = time.perf_counter()
    output = check_output(output, MANIFEST, model, fresh=not overwrite)
    fmt = as_format(format)
    if method == "auto":
        method = "gptq" if fmt.pattern == "dense" else "sparsegpt"
    net, tokenizer = load_model(model, device=_device(device))
    if any(isinstance(module, PackedLinear) for module in net.modules()):
        raise CTPError(f"{model} is packed already: compress the dense model it came from")
    dtype = stored_dtype(model)
    windows = None
    if method in NEEDS_INPUTS:
        length = length or min(2048, context_length(net))
        windows = token_windows(calibration, tokenizer, length, split="train", count=samples, seed=seed)
    work = output.with_name(f".{output.name}.work")
    report: CompressReport = compress_model(
        net, None if windows is None else windows.ids, fmt.with_dtype(dtype), method=method, sparsity=sparsity,
        work_dir=work, progress=progress, **options,
    )  # fmt: skip
    cast_model(net, dtype)
    layers = [module for module in net.modules() if isinstance(module, PackedLinear)]
    info = {
        "base_model": model,
        "format": layers[0].format.name,
        "method": method,
        "sparsity": sparsity if fmt.pattern == "unstructured" else None,
        "calibration": None if windows is None else windows.info,
        "seed": seed,
        "layers": len(layers),
        "bits_per_weight": report.bits_per_weight,
        "relative_error": report.relative_error,
        "bytes_dense": sum(layer.in_features * layer.out_features * layer.dtype.itemsize for layer in layers),
        "bytes_packed": sum(layer.packed.nbytes for layer in layers),
        "seconds": time.perf_counter() - began,
        "version": __version__,
    }
    save_packed(net, output, tokenizer=tokenizer, info=info)
    report.write_csv(output / "layers.csv")
    if csv_path is not None:
        report.write_csv(csv_path)
    shutil.rmtree(work, ignore_errors=True)
    return info


def train_to_folder(
    model: str,
    output: str | Path,
    *,
    data: str = "embedded",
    length: int = 256,
    loss: str = "ce",
    teacher: str | None = None,
    seed: int = 0,
    valid_windows: int = 64,
    device: str = "cpu",
    dtype: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a prompt for a model (packed or dense) into a PEFT folder; returns its training record.

    The train split is learned from, the valid split chooses the checkpoint. `loss="kl"` distils from `teacher`, by
    default the dense model that the packed one was compressed from. `options` go to `train_prompt`.
    """
    resume, overwrite = options.get("resume", False), options.get("overwrite", False)
    output = check_output(output, CONFIG, model, fresh=not (resume or overwrite))
    where = placement(device, dtype)
    net, tokenizer = load_model(model, **where)
    train = token_windows(data, tokenizer, length, split="train")
    valid = token_windows(data, tokenizer, length, split="valid", count=valid_windows)
    dense = None
    if loss == "kl":
        teacher = teacher or _base_of(model)
        dense, _ = load_model(teacher, **where)
    result = train_prompt(
        net, train, valid, tokenizer=tokenizer, loss=loss, teacher=dense, seed=seed, out=output, base_model=model,
        teacher_model=teacher if loss == "kl" else None, **options,
    )  # fmt: skip
    return {
        **result.prompt.info,
        "valid_perplexity_start": result.history[0]["valid_perplexity"],
        "valid_perplexity": result.best_valid,
        "seconds": result.seconds,
    }


def warm_up_model(
    model: str, *, rows: str | None = None, dtype: str = "bfloat16", tune: bool = False
) -> dict[str, Any]:
    """Compile (and tune) the Triton kernels of every kind of packed layer of a model on this machine's GPU.

    Raises CTPError where there is no GPU, or no packed layer.
    """
    from ctp_kernels.backends.triton.warmup import ROWS, Weight, warm_up

    counts, number = _row_counts(rows) if rows else ROWS, _activations(dtype)
    if not torch.cuda.is_available():
        raise CTPError("ctp warmup compiles kernels for a GPU, and PyTorch finds none on this machine")
    if importlib.util.find_spec("triton") is None:
        raise CTPError("ctp warmup compiles Triton kernels, and triton is not installed")
    net, _ = load_model(model, dtype=number, device="cuda")
    if not any(isinstance(module, PackedLinear) for module in net.modules()):
        raise CTPError(f"{model} holds no packed layer: pack it with ctp compress")
    kinds: dict[tuple, Weight] = {}
    for module in net.modules():
        if isinstance(module, PackedLinear):
            group = module.group if module.group is not None and module.group.tensors is not None else None
            tensors, bias = (module.packed.tensors, module.bias) if group is None else (group.tensors, group.bias())
            shape = (module.out_features if group is None else sum(group.rows), module.in_features)
            kinds.setdefault((module.format, shape, bias is None), Weight(module.format, shape, tensors or [], bias))
    launches = len(kinds) * 2 * len({1 << (count - 1).bit_length() for count in counts})
    with tqdm(total=launches, desc="tuning" if tune else "compiling", unit="kernel") as bar:
        result = warm_up(list(kinds.values()), number, rows=counts, tune=tune, progress=bar.update)
    return {"layers": len(kinds), **result}


def explain_model(model: str, *, rows: str | None = None, dtype: str | None = None, device: str = "cpu") -> Explanation:
    """Which kernels run a model's packed layers on a device type that need not be there.

    On "cuda", layers are fused as they would be there, and activations are bf16 where `dtype` does not say otherwise.
    """
    counts = _row_counts(rows) if rows else ()
    if device not in ("cpu", "cuda"):
        raise CTPError(f"--device is cpu or cuda, not {device!r}")
    number = _activations(dtype or "bfloat16") if dtype or device == "cuda" else None
    net, _ = load_model(model)
    if device == "cuda":
        fuse(net)
    return explain(net, number, device=device, rows=counts)


def placement(device: str, dtype: str | None) -> dict[str, Any]:
    """The arguments of `load_model` for --device and --dtype: bf16 on a GPU where nothing else is asked for, as
    `ctp warmup` expects."""
    name = dtype or (None if _device(device) == "cpu" else "bfloat16")
    return {"device": device, "dtype": _activations(name) if name else None}


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise CTPError(f"--device is cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise CTPError("--device cuda needs a GPU, and PyTorch finds none on this machine")
    return name


def _row_counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(count) for count in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise CTPError(f"--rows takes numbers from 1 on, separated by commas, not {text!r}")
    return counts


def _activations(name: str) -> torch.dtype:
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(name)
    if dtype is None:
        raise CTPError(f"--dtype is bfloat16, float16 or float32, not {name!r}")
    return dtype


def _base_of(model: str) -> str:
    folder = Path(model)
    base = read_manifest(folder)["info"].get("base_model") if (folder / MANIFEST).is_file() else None
    if not base:
        raise CTPError(f"{model} does not say which dense model it came from: name one with --teacher")
    return base
