"""Prefill: a model's time to the first token, and memory, versus prompt length.

The prompt is re-run at every call, or its KV kept.
"""

from __future__ import annotations

import pytest
import torch

from bench.models import ALL, QUICK, Setup, Size, llama, on_each_device, random_ids, relative_error, weight_bytes
from ctp.prompt import SoftPrompt, prompt_cache, prompted_logits

CPU = Size("25M", 8, 512, 1408, 8, 4)
PROMPTS = [0, 10, 25, 50, 100, 200]
LENGTHS = [128, 512, 1024]
#: (formats, text tokens, prompt tokens) of a short run: on a GPU every other kind of row count compiles for seconds.
SHORT = {
    "cpu": (["dense", "int4"], LENGTHS, PROMPTS),
    "cuda": (["dense", *QUICK], [128, 1024], [0, 50, 200]),
}


@pytest.mark.parametrize("prompt_tokens", PROMPTS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("format", ["dense", *ALL])
@on_each_device(CPU)
def test_prompt_length(interleave, table, request, setup, format, length, prompt_tokens):
    formats, lengths, prompts = SHORT[setup.device]
    short = format in formats and length in lengths and prompt_tokens in prompts
    if not short and not request.config.getoption("--benchmark-full"):
        pytest.skip("only with --benchmark-full")
    run(interleave, table, setup, format, length, prompt_tokens)


@torch.no_grad()
def run(interleave, table, setup: Setup, format: str, length: int, prompt_tokens: int) -> None:
    net, ids = llama(setup, format), random_ids(setup, 1, length)
    calls = {"no prompt": [lambda: prompted_logits(net, ids)]}
    kv_bytes = 0
    if prompt_tokens:
        generator = torch.Generator().manual_seed(2)
        prompt = SoftPrompt(torch.randn(prompt_tokens, setup.size.hidden, generator=generator) * 0.02)
        kept = prompt_cache(net, prompt)
        kv_bytes = kept.nbytes
        again = prompted_logits(net, ids, prompt=prompt, mode="rerun")
        error = relative_error(prompted_logits(net, ids, prompt=kept), again)
        assert error < setup.tolerance, f"the kept KV changes the logits: relative error {error:.2e}"
        calls["re-run"] = [lambda: prompted_logits(net, ids, prompt=prompt, mode="rerun")]
        calls["KV kept"] = [lambda: prompted_logits(net, ids, prompt=kept)]
    times = interleave(calls, device=setup.device, seconds=1.5 if setup.device == "cpu" else 0.8, least=5)
    for mode in ("re-run", "KV kept"):
        timed = times.get(mode, times["no prompt"])  # without a prompt the two are one
        table.add(setup.device, "prompt_length", {
            "model": setup.size.name, "format": format, "length": length, "prompt_tokens": prompt_tokens,
            "mode": mode, "ms": timed["median"] * 1e3, "ms_p20": timed["low"] * 1e3, "ms_p80": timed["high"] * 1e3,
            "over_no_prompt": timed["median"] / times["no prompt"]["median"],
            "kv_bytes": kv_bytes if mode == "KV kept" else 0, "weight_bytes": weight_bytes(net),
        })  # fmt: skip
