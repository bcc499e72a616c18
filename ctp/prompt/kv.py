"""The prompt at run time: its keys and values, computed once and kept, in front of any text.

In a causal model the prompt's keys and values do not depend on the text after it. So a `PromptCache` holds them
per layer (1, kv_heads, P, head_dim), and every call starts from a copy: no linear layer runs over prompt rows
again. Text positions continue after P, also in a padded row, where pads take no position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache

from ctp_kernels.errors import CTPError

from .soft import SoftPrompt


@dataclass(frozen=True)
class PromptCache:
    """layers: per layer the keys and values (1, kv_heads, P, head_dim) of a prompt in one model."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]

    def __len__(self) -> int:
        return self.layers[0][0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def fill(self, cache: Cache, batch: int) -> Cache:
        """Put the prefix, once per row, into an empty transformers cache of any kind; gradients flow through."""
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        return cache


def prefix_of(model: nn.Module, embeds: torch.Tensor) -> PromptCache:
    """Keys and values of inputs_embeds (1, P, width), with gradient where `embeds` has one.

    Raises CTPError where a sliding window keeps fewer than P of them: text would then see less than it should.
    """
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    positions = torch.arange(embeds.shape[1], device=embeds.device).unsqueeze(0)
    model.base_model(inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True)  # type: ignore[operator]
    layers: Any = cache.layers
    kept = min(layer.keys.shape[2] for layer in layers)
    if kept < embeds.shape[1]:
        raise CTPError(
            f"the prompt has {embeds.shape[1]} tokens, but a sliding window of the model keeps {kept}: shorten it"
        )
    return PromptCache([(layer.keys, layer.values) for layer in layers])


@torch.no_grad()
def prompt_cache(model: nn.Module, prompt: SoftPrompt | torch.Tensor) -> PromptCache:
    """The KV form of a prompt (or of inputs_embeds (1, P, width)) for this model. Call once and keep it."""
    embeds = prompt if isinstance(prompt, torch.Tensor) else prompt.embeds_for(model)
    check_context(model, embeds.shape[1])
    return prefix_of(model, embeds)


def prompted_logits(
    model: nn.Module,
    ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prompt: SoftPrompt | PromptCache | None = None,
    mode: str = "kv",
) -> torch.Tensor:
    """Logits (B, L, vocabulary) at the text positions of ids (B, L); prompt rows cost no vocabulary product.

    attention_mask (B, L), 1 for text and 0 for padding on either side. mode `kv` uses the kept keys and values
    (a SoftPrompt is turned into them first), `rerun` runs the prompt through the model with the text.
    """
    batch, length = ids.shape
    offset = 0 if prompt is None else len(prompt)
    check_context(model, offset + length)
    positions = _positions(ids, attention_mask, offset)
    if prompt is None:
        return _logits(model, input_ids=ids, attention_mask=attention_mask, position_ids=positions)
    mask = None if attention_mask is None else _extend(attention_mask, offset)
    if mode == "kv":
        prefix = prompt if isinstance(prompt, PromptCache) else prompt_cache(model, prompt)
        cache = prefix.fill(DynamicCache(config=model.config), batch)  # type: ignore[arg-type]
        return _logits(model, input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    if mode != "rerun" or isinstance(prompt, PromptCache):
        raise CTPError(f"a {type(prompt).__name__} cannot be used with mode {mode!r}: kv, or rerun with a SoftPrompt")
    embeds = _embed(model, ids, prompt)
    front = torch.arange(offset, device=ids.device).expand(batch, -1)
    positions = torch.cat([front, positions.expand(batch, -1)], 1)
    return _logits(model, inputs_embeds=embeds, attention_mask=mask, position_ids=positions, logits_to_keep=length)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    texts: str | list[str],
    prompt: SoftPrompt | PromptCache | None = None,
    max_new_tokens: int = 64,
    *,
    cache: str = "dynamic",
    mode: str = "kv",
    **options: Any,
) -> list[str]:
    """The continuation of each text, BOS and prompt in front; `options` go to transformers' `generate`.

    Greedy by default. cache: `dynamic` or `static`. mode as in `prompted_logits`. Batches are padded on the left.
    Text and new tokens are decoded together: alone, a SentencePiece decoder would drop the space they begin with.
    """
    ids, mask = encode(tokenizer, [texts] if isinstance(texts, str) else texts)
    ids, mask = ids.to(model.device), mask.to(model.device)  # type: ignore[arg-type]
    new = generate_ids(model, ids, mask, prompt, max_new_tokens, cache=cache, mode=mode, **options)

    def decode(tokens: torch.Tensor) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    each = len(new) // len(ids)  # num_return_sequences
    rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True) for _ in range(each)]
    return [decode(torch.cat([row, tail]))[len(decode(row)) :] for row, tail in zip(rows, new, strict=True)]


@torch.no_grad()
def generate_ids(
    model: nn.Module,
    ids: torch.Tensor,
    attention_mask: torch.Tensor,
    prompt: SoftPrompt | PromptCache | None = None,
    max_new_tokens: int = 64,
    *,
    cache: str = "dynamic",
    mode: str = "kv",
    **options: Any,
) -> torch.Tensor:
    """New token ids (B, <= max_new_tokens) after ids (B, L), which may be padded on the left."""
    if not bool(attention_mask[:, -1].all()):
        raise CTPError("generation continues the last column: pad the texts on the left")
    batch, length = ids.shape
    offset = 0 if prompt is None else len(prompt)
    total = offset + length + max_new_tokens
    check_context(model, total)
    if cache not in ("dynamic", "static"):
        raise CTPError(f"no cache is called {cache!r}: choose dynamic or static")
    config: Any = model.config
    store = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=total)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "past_key_values": store, **options}
    if getattr(model, "generation_config", None) is not None and model.generation_config.pad_token_id is None:  # type: ignore[union-attr]
        eos = model.generation_config.eos_token_id  # type: ignore[union-attr]
        options.setdefault("pad_token_id", eos[0] if isinstance(eos, list) else eos)
    mask = _extend(attention_mask, offset)
    if prompt is not None and mode == "rerun":
        if isinstance(prompt, PromptCache):
            raise CTPError("the prompt can be re-run from its embeddings only: pass the SoftPrompt")
        return model.generate(inputs_embeds=_embed(model, ids, prompt), attention_mask=mask, **options)  # type: ignore[operator]
    if prompt is not None:
        prefix = prompt if isinstance(prompt, PromptCache) else prompt_cache(model, prompt)
        prefix.fill(store, batch * max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1))
        # transformers drops as many leading ids as the cache holds: stand-ins for the prompt, never embedded
        ids = torch.cat([ids[:, :1].expand(batch, offset), ids], 1)
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, offset + length :]  # type: ignore[operator]


def encode(tokenizer: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and attention mask (B, L) of texts that each begin with BOS (where there is one), padded on the left."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [bos + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if not rows or not all(rows):
        raise CTPError("there is no text to continue, and the tokenizer has no BOS to begin with")
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def check_context(model: nn.Module, length: int) -> None:
    """Raise CTPError where prompt and text together exceed the positions the model was built for."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise CTPError(f"prompt and text take {length} positions, but the model has {limit}: shorten one of them")


def _logits(model: nn.Module, **inputs: Any) -> torch.Tensor:
    return model(**inputs, use_cache="past_key_values" in inputs).logits


def _embed(model: nn.Module, ids: torch.Tensor, prompt: SoftPrompt) -> torch.Tensor:
    text = model.get_input_embeddings()(ids)  # type: ignore[operator]
    return torch.cat([prompt.embeds_for(model).expand(ids.shape[0], -1, -1), text], 1)


def _positions(ids: torch.Tensor, mask: torch.Tensor | None, offset: int) -> torch.Tensor:
    """Positions (B or 1, L) of the text after `offset` prompt tokens; pads share their neighbour's."""
    if mask is None:
        return torch.arange(offset, offset + ids.shape[1], device=ids.device).unsqueeze(0)
    return offset + (mask.long().cumsum(1) - 1).clamp(min=0)


def _extend(mask: torch.Tensor, offset: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (offset, 0), value=1)
