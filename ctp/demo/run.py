"""`ctp demo`: compress an embedded model five ways, run it packed, train prompts, measure. No network."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ctp.data import Windows, token_windows
from ctp.evaluate import perplexity
from ctp.evaluate.latency import decode_ms, prompt_length_ms
from ctp.jobs import compress_to_folder
from ctp.model import load_model
from ctp.prompt import SoftPrompt, init_prompt
from ctp.prompt.soft import embedding_table
from ctp.prompt.train import train_prompt
from ctp.report.html import write_report
from ctp.report.table import demo_table
from ctp_kernels import __version__
from ctp_kernels.errors import CTPError
from ctp_kernels.files import write_json

#: (format, sparsity of unstructured formats, name of the folder)
FORMATS = [
    ("int3", None, "int3"),
    ("sparse24-fp16", None, "sparse24"),
    ("unstructured-fp16", 0.5, "unstructured-50"),
    ("unstructured-fp16", 0.625, "unstructured-62.5"),
    ("sparse24-int4", None, "sparse24-int4"),
]
SETTINGS: dict[str, Any] = {
    "data": "embedded:docs", "prompt_tokens": 64, "window": 256, "steps": 120, "batch_size": 4,
    "valid_windows": 32, "test_windows": 96, "calibration_windows": 128,
}  # fmt: skip
PROMPT_LENGTHS = (0, 10, 25, 50, 100, 200)


def run_demo(
    output: Path,
    *,
    model: str = "embedded:llama",
    steps: int | None = None,
    resume: bool = False,
    seed: int = 0,
    echo: Callable[[str], object] = print,
) -> dict[str, Any]:
    """The main job; returns what `results.json` holds.

    `output` gets one folder per format (the packed model, the trained prompt, its row), `results.json` and
    `report.html`. With `resume`, rows that a run with the same settings has finished are kept.
    """
    began = time.perf_counter()
    if output.exists() and not output.is_dir():
        raise CTPError(f"{output} is a file, not a folder: choose another output")
    settings = {**SETTINGS, "model": model, "seed": seed, "steps": steps or SETTINGS["steps"], "version": __version__}
    output.mkdir(parents=True, exist_ok=True)
    dense, tokenizer = load_model(model)
    windows = {
        split: token_windows(settings["data"], tokenizer, settings["window"], split=split, count=count)
        for split, count in (("train", None), ("valid", settings["valid_windows"]), ("test", settings["test_windows"]))
    }
    echo(f"{model}: {sum(p.numel() for p in dense.parameters()):,} parameters, {settings['data']}, "
         f"windows of {settings['window']} tokens, prompts of {settings['prompt_tokens']} tokens, "
         f"{settings['steps']} training steps each, {torch.get_num_threads()} threads")  # fmt: skip

    base = _row(
        output / "dense", settings, resume, echo, lambda folder: _dense_row(dense, tokenizer, windows, settings, folder)
    )
    echo(f"dense: perplexity {base['ppl']:.2f}, with a prompt of its own {base['ppl_prompt']:.2f}")
    rows = []
    for format, sparsity, name in FORMATS:
        row = _row(
            output / name, settings, resume, echo,
            lambda folder, f=format, s=sparsity: _packed_row(dense, tokenizer, windows, settings, base, f, s, folder),
        )  # fmt: skip
        rows.append(row)
        echo(f"{name}: perplexity {row['ppl_compressed']:.2f}, with a trained prompt {row['ppl_prompt']:.2f}: "
             f"{row['gap_recovered']:.0%} of the gap recovered in {row['train_seconds']:.0f} s")  # fmt: skip
    result = {
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "settings": settings,
        "windows": {split: w.info for split, w in windows.items()},
        "dense": base,
        "rows": rows,
        "prompt_length": _prompt_lengths(dense, output),
        "seconds": time.perf_counter() - began,
    }
    write_json(output / "results.json", result)
    write_report(result, output / "report.html")
    echo("")
    echo(demo_table(result))
    echo(f"\n{output / 'results.json'} and {output / 'report.html'} written, {result['seconds']:.0f} s in all")
    return result


def _row(
    folder: Path, settings: dict, resume: bool, echo: Callable[[str], object], make: Callable[[Path], dict]
) -> dict[str, Any]:
    """The row of a folder: kept from an earlier run of the same settings where asked, else made and saved."""
    path = folder / "row.json"
    if resume and path.is_file():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CTPError(f"{path} is damaged: remove it, or run without --resume") from error
        if saved.get("settings") == settings:
            echo(f"{folder.name}: kept from an earlier run")
            return saved["row"]
    echo(f"\n== {folder.name}")
    folder.mkdir(parents=True, exist_ok=True)
    row = make(folder)
    write_json(path, {"settings": settings, "row": row})
    return row


def _dense_row(dense: nn.Module, tokenizer: Any, windows: dict[str, Windows], settings: dict, folder: Path) -> dict:
    trained, seconds = _train(dense, tokenizer, windows, settings, folder)
    return {
        "ppl": perplexity(dense, windows["test"]).perplexity,
        "ppl_bos": perplexity(dense, windows["test"], prompt=_bos_prompt(dense, tokenizer)).perplexity,
        "ppl_prompt": perplexity(dense, windows["test"], prompt=trained).perplexity,
        "train_seconds": seconds,
    }


def _packed_row(
    dense: nn.Module, tokenizer: Any, windows: dict[str, Windows], settings: dict, base: dict, format: str,
    sparsity: float | None, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    info = compress_to_folder(
        settings["model"], folder / "model", format, sparsity=0.5 if sparsity is None else sparsity,
        calibration=settings["data"], samples=settings["calibration_windows"], length=settings["window"],
        seed=settings["seed"], overwrite=True,
    )  # fmt: skip
    packed, _ = load_model(str(folder / "model"))
    compressed = perplexity(packed, windows["test"])
    untrained = init_prompt(packed, settings["prompt_tokens"], seed=settings["seed"])
    trained, seconds = _train(packed, tokenizer, windows, settings, folder)
    prompted = perplexity(packed, windows["test"], prompt=trained)
    latency = decode_ms({"dense": dense, "packed": packed})
    return {
        "model": settings["model"],
        "format": format,
        "method": info["method"],
        "sparsity": sparsity,
        "bits_per_weight": info["bits_per_weight"],
        "bytes_dense": info["bytes_dense"],
        "bytes_packed": info["bytes_packed"],
        "ppl_dense": base["ppl"],
        "ppl_dense_prompt": base["ppl_prompt"],
        "ppl_compressed": compressed.perplexity,
        "ppl_bos": perplexity(packed, windows["test"], prompt=_bos_prompt(packed, tokenizer)).perplexity,
        "ppl_untrained_prompt": perplexity(packed, windows["test"], prompt=untrained).perplexity,
        "ppl_prompt": prompted.perplexity,
        "ppl_prompt_published_divisor": prompted.perplexity_published_divisor,
        "prompt_tokens": settings["prompt_tokens"],
        "gap_recovered": math.log(compressed.perplexity / prompted.perplexity)
        / math.log(compressed.perplexity / base["ppl"]),
        "ms_per_token_dense": latency["dense"],
        "ms_per_token_packed": latency["packed"],
        "compress_seconds": info["seconds"],
        "train_seconds": seconds,
    }


def _train(
    net: nn.Module, tokenizer: Any, windows: dict[str, Windows], settings: dict, folder: Path
) -> tuple[SoftPrompt, float]:
    result = train_prompt(
        net, windows["train"], windows["valid"], tokens=settings["prompt_tokens"], steps=settings["steps"],
        batch_size=settings["batch_size"], seed=settings["seed"], out=folder / "prompt", overwrite=True,
    )  # fmt: skip
    return result.prompt, result.seconds


def _bos_prompt(net: nn.Module, tokenizer: Any) -> SoftPrompt:
    """One more BOS in front of the window (which begins with BOS itself): what any prefix gives, without learning."""
    row = embedding_table(net)[tokenizer.bos_token_id].detach()
    return SoftPrompt(row.float().cpu().unsqueeze(0))


def _prompt_lengths(dense: nn.Module, output: Path) -> dict[str, list[dict[str, float]]]:
    packed, _ = load_model(str(output / FORMATS[0][2] / "model"))
    return {"dense": prompt_length_ms(dense, PROMPT_LENGTHS), FORMATS[0][2]: prompt_length_ms(packed, PROMPT_LENGTHS)}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
