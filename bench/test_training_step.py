"""One step of prompt training (forward, backward into the prompt) of a patched LLaMA, beside the dense fp32 model."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctp_kernels import patch_model

FORMATS = ["int4", "int3", "sparse24-int4", "sparse24-bf16", "unstructured-bf16"]
BATCH, LENGTH, PROMPT = 8, 96, 32  # 1024 rows in every layer


@lru_cache(maxsize=1)
def dense_model() -> LlamaForCausalLM:
    """Four layers, hidden size 1024, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def halved(net: LlamaForCausalLM) -> LlamaForCausalLM:
    net = copy.deepcopy(net)
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.mul_(torch.rand_like(module.weight) >= 0.5)
    return net


def bitsandbytes_model() -> torch.nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    net = copy.deepcopy(dense_model())
    for name, module in list(net.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32)
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False)
            net.set_submodule(name, layer.to("cpu"))
    return net


def weight_bytes(net: torch.nn.Module) -> int:
    return sum(t.nbytes for t in {t.data_ptr(): t for t in (*net.parameters(), *net.buffers())}.values())


def step(net: torch.nn.Module, prompt: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    prompt.grad = None
    words = net.get_input_embeddings()(ids)
    embeddings = torch.cat([prompt.expand(len(ids), -1, -1), words], dim=1)
    logits = net(inputs_embeds=embeddings, use_cache=False).logits[:, PROMPT:-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return prompt.grad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", [*FORMATS, "bitsandbytes-fp4"])
def test_cpu_training_step(interleave, table, format):
    dense = dense_model()
    if format == "bitsandbytes-fp4":
        other = bitsandbytes_model()
    else:
        other = patch_model(halved(dense) if format.startswith("unstructured") else copy.deepcopy(dense), format)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 2048, (BATCH, LENGTH), generator=generator)
    prompt = (torch.randn(PROMPT, 1024, generator=generator) * 0.02).requires_grad_()
    assert step(other, prompt, ids).abs().max() > 0
    calls = {"dense": [lambda: step(dense, prompt, ids)], "packed": [lambda: step(other, prompt, ids)]}
    times = interleave(calls, seconds=6, least=5)
    table.add("cpu", "training_step", {
        "format": format, "rows": BATCH * (LENGTH + PROMPT), "dense_ms": times["dense"]["median"] * 1e3,
        "packed_ms": times["packed"]["median"] * 1e3,
        "speedup": times["dense"]["median"] / times["packed"]["median"],
        "weight_bytes_dense": weight_bytes(dense), "weight_bytes_packed": weight_bytes(other),
    })  # fmt: skip
