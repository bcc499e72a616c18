"""Tokens a second of a patched model beside the dense one: batch x prompt length, eagerly and in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from bench.gpu import captured
from bench.machine import machine
from bench.models import ALL, QUICK, Setup, Size, llama, on_each_device, random_ids, weight_bytes
from ctp.prompt import PromptCache, prompt_cache

CPU = Size("79M", 6, 1024, 2816, 8, 8)
TEXT, STEPS = 128, 8  # tokens before the first that is timed, and timed tokens a round
#: (sequences, prompt tokens, mode) of a short run.
SHORT = {
    "cpu": [(1, 0, "eager"), (4, 0, "eager")],
    "cuda": [(1, 0, "eager"), (1, 0, "graph"), (1, 200, "graph"), (16, 0, "graph")],
}


class Decoding:
    """Greedy decoding with a static cache: every step works on the same memory, so that a CUDA graph can hold it."""

    def __init__(self, net: Any, ids: torch.Tensor, prompt: PromptCache | None, steps: int) -> None:
        """Read the prompt and ids (B, L), up to the first new token."""
        batch, length = ids.shape
        offset = 0 if prompt is None else len(prompt)
        self.net, self.start, device = net, offset + length, ids.device
        self.cache: Any = StaticCache(config=net.config, max_cache_len=self.start + steps)
        if prompt is not None:
            prompt.fill(self.cache, batch)
        positions = torch.arange(offset, self.start, device=device).unsqueeze(0)
        logits = net(ids, position_ids=positions, past_key_values=self.cache, logits_to_keep=1).logits
        self.first = logits.argmax(-1)
        self.token, self.position = self.first.clone(), torch.full((1, 1), self.start, device=device)
        self.places = torch.arange(self.start + steps, device=device).view(1, 1, 1, -1)

    def restart(self) -> None:
        self.token.copy_(self.first)
        self.position.fill_(self.start)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start)

    def step(self) -> None:
        """Append one token a sequence; `token` (B, 1) becomes it. The mask is made here: transformers' own code looks
        at values on the host."""
        mask = (self.places <= self.position).expand(len(self.token), -1, -1, -1)
        logits = self.net(
            self.token, position_ids=self.position, attention_mask=mask, past_key_values=self.cache
        ).logits
        self.token.copy_(logits.argmax(-1))
        self.position.add_(1)

    def round(self) -> torch.Tensor:
        """The first new token, and STEPS more (B, STEPS + 1), always the same."""
        self.restart()
        tokens = [self.token.clone()]
        for _ in range(STEPS):
            self.step()
            tokens.append(self.token.clone())
        return torch.cat(tokens, 1)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("prompt_tokens", [0, 50, 200])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("format", ALL)
@on_each_device(CPU)
def test_decode(interleave, table, request, setup, format, batch, prompt_tokens, mode):
    if setup.device == "cpu" and mode == "graph":
        pytest.skip("CUDA graphs are for a GPU")
    short = format in QUICK and (batch, prompt_tokens, mode) in SHORT[setup.device]
    if not short and not request.config.getoption("--benchmark-full"):
        pytest.skip("only with --benchmark-full")
    run(interleave, table, setup, format, batch, prompt_tokens, mode)


@torch.no_grad()
def run(interleave, table, setup: Setup, format: str, batch: int, prompt_tokens: int, mode: str) -> None:
    nets = {"dense": llama(setup, "dense"), "packed": llama(setup, format)}
    generator = torch.Generator().manual_seed(2)
    embeds = (torch.randn(1, prompt_tokens, setup.size.hidden, generator=generator) * 0.02).to(
        setup.device, setup.dtype
    )
    rounds, kept, kv_bytes = {}, [], 0
    for name, net in nets.items():
        prompt = prompt_cache(net, embeds) if prompt_tokens else None
        decoding = Decoding(net, random_ids(setup, batch, TEXT), prompt, STEPS)
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in decoding.cache.layers)
        kept.append(decoding)  # a graph does not keep the memory that it reads
        rounds[name] = [decoding.round]
        if mode == "graph":
            expected = decoding.round()
            replay, tokens = captured(decoding.round)
            replay()
            assert torch.equal(tokens, expected), "a captured graph gives other tokens than eager calls"
            rounds[name] = [replay]
    times = interleave(rounds, device=setup.device, seconds=2, least=5)
    dense, packed = (times[name]["median"] / STEPS for name in nets)
    nbytes = weight_bytes(nets["packed"])
    table.add(setup.device, "decode", {
        "model": setup.size.name, "format": format, "batch": batch, "prompt_tokens": prompt_tokens, "mode": mode,
        "dense_ms": dense * 1e3, "packed_ms": packed * 1e3, "packed_ms_p20": times["packed"]["low"] / STEPS * 1e3,
        "packed_ms_p80": times["packed"]["high"] / STEPS * 1e3, "speedup": dense / packed,
        "dense_tokens_per_s": batch / dense, "packed_tokens_per_s": batch / packed,
        "gb_per_s": (nbytes + kv_bytes) / packed / 1e9,
        "share_of_limit": (nbytes + kv_bytes) / packed / 1e9 / machine(setup.device).gb_per_s,
        "weight_bytes_dense": weight_bytes(nets["dense"]), "weight_bytes_packed": nbytes, "kv_bytes": kv_bytes,
    })  # fmt: skip
