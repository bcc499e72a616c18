"""Perplexity over scored tokens: exp(sum of NLL / number of scored tokens)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ctp.data import Windows
from ctp.prompt.kv import PromptCache, prompt_cache, prompted_logits
from ctp.prompt.soft import SoftPrompt
from ctp_kernels.errors import CTPError


@dataclass(frozen=True)
class PerplexityResult:
    """nll: sum over the scored tokens, in nats; window_nll: that of each window (n,), which `as_dict` leaves out.

    `perplexity_published_divisor` divides by the prompt positions too, as the method's published code does; it is
    lower than the perplexity whenever there is a prompt, and is here only to compare with printed figures.
    """

    perplexity: float
    nll: float
    tokens: int
    prompt_tokens: int
    perplexity_published_divisor: float
    window_nll: list[float]

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "window_nll"}


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Windows,
    *,
    prompt: SoftPrompt | PromptCache | None = None,
    batch_size: int = 8,
    mode: str = "kv",
    progress: bool = False,
) -> PerplexityResult:
    """Perplexity of the windows' scored tokens, the same targets with and without a prompt.

    Prompt positions are neither scored nor counted. log-softmax in fp32, summed in fp64. mode as in
    `ctp.prompt.kv.prompted_logits`. The perplexity may be infinite. Raises CTPError for outputs that hold NaN, and for
    windows without a scored token.
    """
    tokens = int(windows.scored[:, 1:].sum())
    if not tokens:
        raise CTPError("the windows hold no token to score: use longer ones")
    device = next(model.parameters()).device
    if isinstance(prompt, SoftPrompt) and mode == "kv":
        prompt = prompt_cache(model, prompt)
    per_window: list[float] = []
    for start in tqdm(range(0, len(windows), batch_size), unit="batch", disable=None if progress else True):
        ids = windows.ids[start : start + batch_size].to(device)
        scored = windows.scored[start : start + batch_size, 1:].to(device)
        logits = prompted_logits(model, ids[:, :-1], prompt=prompt, mode=mode)
        for row, targets, mask in zip(logits, ids[:, 1:], scored, strict=True):  # by row: one window in fp32 at a time
            losses = torch.nn.functional.cross_entropy(row.float(), targets, reduction="none")
            per_window.append(losses[mask].double().sum().item())
    nll = sum(per_window)
    if math.isnan(nll):
        raise CTPError("the model's outputs hold NaN: load it in fp32 or bf16, or check its weights")
    offset = 0 if prompt is None else len(prompt)
    return PerplexityResult(
        perplexity=_exp(nll / tokens),
        nll=nll,
        tokens=tokens,
        prompt_tokens=offset,
        perplexity_published_divisor=_exp(nll / (tokens + offset * len(windows))),
        window_nll=per_window,
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
