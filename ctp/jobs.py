"""The steps of the main job from names to folders: what the command line and the demo share."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from ctp_kernels import PackedLinear, __version__, as_format
from ctp_kernels.checkpoints import read_manifest, save_packed
from ctp_kernels.checkpoints.manifest import MANIFEST
from ctp_kernels.errors import CTPError

from .compress import CompressReport, compress_model
from .compress.solver import NEEDS_INPUTS
from .data import token_windows
from .model import context_length, load_model
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
    **options: Any,
) -> dict[str, Any]:
    """Compress a model (folder, hub or embedded name) into a packed folder; returns what the manifest records.

    `method="auto"` is sparsegpt for a sparse pattern and gptq for a dense one. Finished blocks are kept in
    `.<output>.work` until the folder is written, so that the same call goes on after an interruption. The error
    table is `layers.csv` beside the weights (and at `csv_path`). `options` go to `compress_model`.
    """
    began = time.perf_counter()
    output = Path(output)
    fmt = as_format(format)
    if method == "auto":
        method = "gptq" if fmt.pattern == "dense" else "sparsegpt"
    net, tokenizer = load_model(model)
    if any(isinstance(module, PackedLinear) for module in net.modules()):
        raise CTPError(f"{model} is packed already: compress the dense model it came from")
    windows = None
    if method in NEEDS_INPUTS:
        length = length or min(2048, context_length(net))
        windows = token_windows(calibration, tokenizer, length, split="train", count=samples, seed=seed)
    work = output.with_name(f".{output.name}.work")
    report: CompressReport = compress_model(
        net, None if windows is None else windows.ids, fmt, method=method, sparsity=sparsity, work_dir=work,
        progress=progress, **options,
    )  # fmt: skip
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
    **options: Any,
) -> dict[str, Any]:
    """Train a prompt for a model (packed or dense) into a PEFT folder; returns its training record.

    The train split is learned from, the valid split chooses the checkpoint. `loss="kl"` distils from `teacher`, by
    default the dense model that the packed one was compressed from. `options` go to `train_prompt`.
    """
    net, tokenizer = load_model(model)
    train = token_windows(data, tokenizer, length, split="train")
    valid = token_windows(data, tokenizer, length, split="valid", count=valid_windows)
    dense = None
    if loss == "kl":
        dense, _ = load_model(teacher or _base_of(model))
    result = train_prompt(
        net, train, valid, tokenizer=tokenizer, loss=loss, teacher=dense, seed=seed, out=output, base_model=model,
        **options,
    )  # fmt: skip
    return {
        **result.prompt.info,
        "valid_perplexity_start": result.history[0]["valid_perplexity"],
        "valid_perplexity": result.best_valid,
        "seconds": result.seconds,
    }


def _base_of(model: str) -> str:
    folder = Path(model)
    base = read_manifest(folder)["info"].get("base_model") if (folder / MANIFEST).is_file() else None
    if not base:
        raise CTPError(f"{model} does not say which dense model it came from: name one with --teacher")
    return base
