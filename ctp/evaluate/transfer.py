"""The transfer matrix: every prompt on every model and text, each beside the same text without a prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from ctp.data import token_windows
from ctp.model import context_length, load_model
from ctp.prompt.soft import SoftPrompt
from ctp_kernels.errors import CTPError
from ctp_kernels.files import write_json

from .perplexity import perplexity

_Z = NormalDist().inv_cdf(0.975)


def interval(sums: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float, float]:
    """sum(sums) / sum(tokens) and the ends of its 95 % confidence interval, the windows (n,) drawn at random.

    The interval of a ratio estimator by linearisation (Cochran, Sampling Techniques, section 6.4), normal: so for some
    thirty windows or more. Infinitely wide for one window.
    """
    n, total = len(sums), tokens.sum().item()
    mean = sums.sum().item() / total
    if n < 2:
        return mean, -math.inf, math.inf
    spread = ((sums - mean * tokens).square().sum() * n / (n - 1)).sqrt().item() / total
    return mean, mean - _Z * spread, mean + _Z * spread


def transfer(
    models: Sequence[str],
    prompts: Sequence[str | Path],
    data: Sequence[str],
    *,
    split: str = "test",
    length: int | None = None,
    count: int | None = None,
    batch_size: int = 8,
    path: Path | None = None,
    resume: bool = False,
    progress: bool = False,
    seed: int = 0,
    **where: Any,
) -> dict[str, Any]:
    """{"settings", "rows"}: a row for each model, text and prompt (None: without one).

    A row holds `perplexity`, and `ratio`, that to the perplexity without a prompt on the same windows of the same
    model, each with the ends of its 95 % confidence interval (`_low`, `_high`; None where one window gives none). The
    ratio's is taken over differences window by window: it is far narrower than the perplexities' own.

    A window leaves room for the longest prompt, with and without one. The result is written to `path` after every
    cell; with `resume`, cells that stand there already are kept, by the names of model, text and prompt: what was made
    anew under an old name is not seen. `where` goes to `load_model`. Raises CTPError for
    names given twice, for a file of other settings, and as `load_model`, `SoftPrompt.load` and `perplexity` do.
    """
    names: list[str | None] = [None, *map(str, prompts)]
    for kind, given in (("model", models), ("prompt", names), ("text", data)):
        if len(set(given)) < len(given):
            raise CTPError(f"a {kind} is named twice: name each once")
    softs = {name: SoftPrompt.load(name) if name else None for name in names}
    longest = max(len(soft) if soft else 0 for soft in softs.values())
    dtype = where.get("dtype")
    settings = {
        "split": split, "length": length, "count": count, "longest_prompt": longest, "seed": seed,
        "dtype": dtype and str(dtype).removeprefix("torch."),
    }  # fmt: skip
    rows = _kept(path, settings) if resume else {}
    wanted = [(model, text, name) for model in models for text in data for name in names]

    def result() -> dict[str, Any]:
        order = dict.fromkeys([*wanted, *rows])  # what else the file holds stays in it
        return {"settings": settings, "rows": [rows[key] for key in order if key in rows]}

    for model in models:
        if all(key in rows for key in wanted if key[0] == model):
            continue
        net, tokenizer = load_model(model, **where)
        for soft in softs.values():
            if soft:
                soft.embeds_for(net)  # another width is found before anything is measured
        for text in data:
            window = length or min(2048, context_length(net) - longest)
            windows = token_windows(text, tokenizer, window, split=split, count=count)
            tokens = windows.scored[:, 1:].sum(1).double()
            for name in names:
                key = (model, text, name)
                if key in rows:
                    continue
                measured = perplexity(net, windows, prompt=softs[name], batch_size=batch_size, progress=progress)
                nll = measured.window_nll
                row: dict[str, Any] = {"model": model, "data": text, "prompt": name, "length": window}
                row |= _exponents("perplexity", interval(_losses(nll), tokens))
                if name is not None:
                    base = _losses(rows[model, text, None]["nll"])
                    row |= _exponents("ratio", interval(_losses(nll) - base, tokens))
                row |= {"nll": nll, "tokens": tokens.long().tolist()}  # of each window
                rows[key] = row
                if path is not None:
                    write_json(path, result())
    return result()


def _losses(nll: list[float]) -> torch.Tensor:
    """Windows (n,); in JSON an infinite one reads as None."""
    return torch.tensor([math.inf if value is None else value for value in nll], dtype=torch.float64)


def _exponents(name: str, values: tuple[float, float, float]) -> dict[str, float | None]:
    keys = (name, f"{name}_low", f"{name}_high")
    finite = (math.exp(value) if abs(value) < 700 else None for value in values)
    return dict(zip(keys, finite, strict=True))


def _kept(path: Path | None, settings: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    if path is None:
        raise CTPError("--resume goes on from the file that --json names: name one")
    if not path.exists():
        return {}
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        rows = {(row["model"], row["data"], row["prompt"]): row for row in before["rows"]}
        same = before["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CTPError(f"{path} holds no transfer matrix to go on from: {error}") from error
    if not same:
        raise CTPError(f"{path} was made with other settings: name another file, or leave --resume out")
    return rows
