"""LLaMA-shaped models with random weights, packed on the device they run on; the same benchmarks on a CPU and a GPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctp_kernels import FORMATS, patch_model, unpatch_model

#: The formats of a short run; --benchmark-full takes the others too.
QUICK = ["int4", "int3", "sparse24-bf16", "sparse24-int4", "unstructured-bf16", "unstructured-int4"]
ALL = [*QUICK, *(name for name in FORMATS if name not in QUICK)]


@dataclass(frozen=True)
class Size:
    """A LLaMA's dimensions. Embeddings are tied, so that every byte of the model is read for every token."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 2048


TINY = Size("tiny", 2, 64, 176, 4, 2, 96)
SEVEN_B = Size("7B", 32, 4096, 11008, 32, 32, 32000)


@dataclass(frozen=True)
class Setup:
    """Where a benchmark runs, and the model it runs there."""

    device: str
    dtype: torch.dtype
    size: Size

    def __str__(self) -> str:
        return f"{self.device}-{self.size.name}"

    @property
    def tolerance(self) -> float:
        """Relative error allowed between two ways to compute the same logits: roundings through all layers."""
        return 1e-3 if self.dtype == torch.float32 else 5e-2


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_each_device(cpu: Size):
    """Parametrise `setup`: a model that a CPU runs in a second, fp32; 7B, bf16, on a GPU."""
    setups = [Setup("cpu", torch.float32, cpu), pytest.param(Setup("cuda", torch.bfloat16, SEVEN_B), marks=gpu)]
    return pytest.mark.parametrize("setup", setups, ids=str)


@lru_cache(maxsize=2)  # the dense model, and the one beside it
def llama(setup: Setup, format: str) -> LlamaForCausalLM:
    """One decoder layer is made, packed and checked; the others are copies, each with memory of its own.

    `format`: "dense", a name of FORMATS (unstructured: half of the weight is zero), or "bitsandbytes-fp4".
    """
    size = setup.size
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=1,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(setup.device):
        net: Any = LlamaForCausalLM(config)
    net.to(setup.dtype).eval().requires_grad_(False)
    if format == "bitsandbytes-fp4":
        _to_bitsandbytes(net, setup)
    elif format != "dense":
        if format.startswith("unstructured"):
            for linear in _linears(net).values():
                linear.weight.mul_(torch.rand_like(linear.weight) >= 0.5)
        _check(patch_model(net, format), setup)
    for index in range(1, size.layers):
        layer = copy.deepcopy(net.model.layers[0])
        layer.self_attn.layer_idx = index
        net.model.layers.append(layer)
    net.config.num_hidden_layers = size.layers
    return net


@torch.no_grad()
def _check(net: Any, setup: Setup) -> None:
    """Raise where the packed model is not the model of its unpacked weights: what is wrong is not timed."""
    dense = unpatch_model(copy.deepcopy(net))
    for length in (1, 40):
        ids = torch.arange(length, device=setup.device).unsqueeze(0)
        error = relative_error(net(ids).logits, dense(ids).logits)
        assert error < setup.tolerance, f"the packed model is wrong at {length} rows: relative error {error:.2e}"


def _to_bitsandbytes(net: LlamaForCausalLM, setup: Setup) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for name, linear in _linears(net).items():
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=setup.dtype)
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False)
        net.set_submodule(name, layer.to(setup.device))


def _linears(net: LlamaForCausalLM) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in net.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def random_ids(setup: Setup, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, setup.size.vocabulary, (batch, length), generator=generator).to(setup.device)


def weight_bytes(net: torch.nn.Module) -> int:
    return sum(t.nbytes for t in {t.data_ptr(): t for t in (*net.parameters(), *net.buffers())}.values())
