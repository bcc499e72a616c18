"""How long a token takes: models side by side, interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import DynamicCache

from ctp.prompt.kv import check_context, prompt_cache, prompted_logits
from ctp.prompt.soft import SoftPrompt, embedding_table


def interleaved_ms(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, timed in turn so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first round warms up
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begun) * 1e3)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


@torch.no_grad()
def decode_ms(models: Mapping[str, nn.Module], *, context: int = 64, rounds: int = 40) -> dict[str, float]:
    """Milliseconds to decode one token (batch 1) after `context` tokens in the KV cache, for each model."""

    def step(model: nn.Module) -> Callable[[], object]:
        device = embedding_table(model).device
        cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
        check_context(model, context + 1)
        model(input_ids=torch.full((1, context), 5, device=device), past_key_values=cache, use_cache=True)
        token = torch.full((1, 1), 5, device=device)

        def run() -> None:
            model(input_ids=token, past_key_values=cache, use_cache=True)
            cache.crop(-1)

        return run

    return interleaved_ms({name: step(model) for name, model in models.items()}, rounds)


@torch.no_grad()
def prompt_length_ms(
    model: nn.Module, prompt_lengths: Sequence[int], *, length: int = 256, rounds: int = 7
) -> list[dict[str, float]]:
    """Milliseconds of one forward over `length` tokens behind prompts of each length: re-run, and with its KV kept.

    One row {prompt_tokens, length, rerun_ms, kv_ms} per prompt length; without a prompt the two are one.
    """
    table = embedding_table(model)
    ids = torch.full((1, length), 5, device=table.device)
    rows = []
    for tokens in prompt_lengths:
        check_context(model, tokens + length)
        if tokens:
            prompt = SoftPrompt(table[torch.arange(tokens) % len(table)].float().cpu())
            kept = prompt_cache(model, prompt)
            calls = {
                "rerun": lambda p=prompt: prompted_logits(model, ids, prompt=p, mode="rerun"),
                "kv": lambda p=kept: prompted_logits(model, ids, prompt=p),
            }
            times = interleaved_ms(calls, rounds)
        else:
            alone = interleaved_ms({"none": lambda: prompted_logits(model, ids)}, rounds)["none"]
            times = {"rerun": alone, "kv": alone}
        rows.append({"prompt_tokens": tokens, "length": length, "rerun_ms": times["rerun"], "kv_ms": times["kv"]})
    return rows
