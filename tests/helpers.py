"""What several test files share: format names, small models, weights that suit a format, the real data's place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ctp_kernels import FORMATS, Format

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "models" / "stories260K"
needs_shared = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no real model and text at {SHARED}")

#: Every format of the table, and the group variants that the table does not hold.
FORMAT_NAMES = [
    *FORMATS,
    *("int4-g64-asym", "int3-row-asym", "int2-g8", "int8-row", "sparse24-int4-g24", "sparse24-int3-row-asym"),
    *("unstructured-int4-g64-asym", "unstructured-int3-row"),
]


def weight_for(format: Format, n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A random (N, K) weight, 60 % zeros and one empty row where the format is unstructured."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    if format.pattern == "unstructured":
        weight *= torch.rand(n, k, generator=generator) > 0.6
        weight[n // 2] = 0
    return weight.to(dtype)


def _llama(**kwargs) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=172, **kwargs))


def _opt(**kwargs) -> OPTForCausalLM:
    return OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=128, dropout=0.0, **kwargs))


SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 128}  # fmt: skip

MODELS = {
    "llama-gqa-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-biases": lambda: _llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SMALL, num_key_value_heads=2, intermediate_size=172, sliding_window=None)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2, intermediate_size=172)),
    "opt": lambda: _opt(word_embed_proj_dim=64),
    "opt-350m-like": lambda: _opt(word_embed_proj_dim=32, do_layer_norm_before=False),
}


def small_model(name: str) -> torch.nn.Module:
    """A random model of two layers, eval mode, nothing trainable, larger weights than at initialisation."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.mul_(5)
            if module.bias is not None:
                module.bias.normal_(std=0.1)
    return model
