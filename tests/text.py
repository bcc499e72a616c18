"""A tokenizer of single characters for the small models (96 entries), and windows of random tokens."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ctp.data import Windows

SPECIAL = ["<s>", "</s>", "<pad>"]
CHARACTERS = [chr(c) for c in range(32, 124)] + ["\n"]


def character_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a character; BOS 0 (or none at all), EOS 1, padding and unknown 2."""
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(SPECIAL + CHARACTERS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="<pad>"
    )


def random_windows(count: int, length: int, vocabulary: int = 96, seed: int = 0) -> Windows:
    """Windows with BOS 0 in front, every other token scored."""
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    return Windows(ids, scored, {"data": "random", "seed": seed})
