"""The patched model's latency and memory versus prompt length: the prompt re-run at every call, or its KV kept."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctp.prompt import SoftPrompt, prompt_cache, prompted_logits
from ctp_kernels import patch_model

PROMPTS = [0, 10, 25, 50, 100, 200]
LENGTHS = [128, 512, 1024]
FORMATS = ["dense", "int4", "sparse24-int4", "unstructured"]
QUICK = {"dense", "int4"}


@lru_cache(maxsize=1)
def model(format: str, device: str) -> LlamaForCausalLM:
    """A LLaMA of 8 layers, hidden size 512, random weights (half of them zero where unstructured): 25 M parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    net = LlamaForCausalLM(config).eval().requires_grad_(False).to(device)
    if format == "unstructured":
        for module in net.modules():
            if isinstance(module, torch.nn.Linear) and module is not net.lm_head:
                module.weight.mul_(torch.rand_like(module.weight) >= 0.5)
    return net if format == "dense" else patch_model(net, format)


@pytest.mark.parametrize("prompt_tokens", PROMPTS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("format", FORMATS)
def test_cpu_prompt_length(interleave, table, request, format, length, prompt_tokens):
    run(interleave, table, request, "cpu", format, length, prompt_tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prompt_tokens", PROMPTS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("format", FORMATS)
def test_gpu_prompt_length(interleave, table, request, format, length, prompt_tokens):
    run(interleave, table, request, "cuda", format, length, prompt_tokens)


@torch.no_grad()
def run(interleave, table, request, device: str, format: str, length: int, prompt_tokens: int) -> None:
    if format not in QUICK and not request.config.getoption("--benchmark-full"):
        pytest.skip("only with --benchmark-full")
    net = model(format, device)
    ids = torch.randint(0, 2048, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    calls = {"no prompt": [lambda: prompted_logits(net, ids)]}
    kv_bytes = 0
    if prompt_tokens:
        prompt = SoftPrompt(torch.randn(prompt_tokens, 512, generator=torch.Generator().manual_seed(2)) * 0.02)
        kept = prompt_cache(net, prompt)
        kv_bytes = kept.nbytes
        again = prompted_logits(net, ids, prompt=prompt, mode="rerun")
        difference = (prompted_logits(net, ids, prompt=kept) - again).abs().max().item()
        assert difference < 1e-3 * again.abs().max().item() + 1e-4, f"the kept KV changes the logits by {difference}"
        calls["re-run"] = [lambda: prompted_logits(net, ids, prompt=prompt, mode="rerun")]
        calls["KV kept"] = [lambda: prompted_logits(net, ids, prompt=kept)]
    times = interleave(calls, device=device, seconds=1.5, least=5)
    weights = sum(t.nbytes for t in {t.data_ptr(): t for t in net.state_dict().values()}.values())
    for mode in ("re-run", "KV kept"):
        timed = times.get(mode, times["no prompt"])  # without a prompt the two are one
        table.add(device, "prompt_length", {
            "format": format, "length": length, "prompt_tokens": prompt_tokens, "mode": mode,
            "ms": timed["median"] * 1e3, "ms_p20": timed["low"] * 1e3, "ms_p80": timed["high"] * 1e3,
            "over_no_prompt": timed["median"] / times["no prompt"]["median"],
            "kv_bytes": kv_bytes if mode == "KV kept" else 0, "weight_bytes": weights,
        })  # fmt: skip
