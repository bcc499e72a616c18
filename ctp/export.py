"""Hand a packed model or a prompt to other software: `ctp export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ctp_kernels import __version__
from ctp_kernels.checkpoints import LAYOUTS, RECORD, export_model
from ctp_kernels.errors import CTPError
from ctp_kernels.files import check_output, staged_folder, write_json

from .model import load_model, load_stored
from .prompt.soft import CONFIG, SoftPrompt, embedding_table

#: What a prompt is exported to; what a model is: `ctp_kernels.checkpoints.LAYOUTS`.
PROMPTS = ("peft", "tokens")
TOKENS = "tokens.json"


def export_to_folder(
    model: str, output: str | Path, to: str, *, prompt: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write a packed model (`gptq`, `compressed-tensors`, `dense`) or a prompt of it (`peft`, `tokens`) to `output`.

    Returns what was written, plain JSON. Raises CTPError for what the layout cannot hold, and for an earlier export at
    `output` without `overwrite`; nothing is changed then.
    """
    if to in LAYOUTS and prompt is None:
        output = check_output(output, RECORD, model, fresh=not overwrite)
        net, tokenizer = load_stored(model)
        record = {"from": Path(model).name, "version": __version__}
        return export_model(net, output, to, tokenizer=tokenizer, record=record)
    if to in PROMPTS and prompt is not None:
        output = check_output(output, CONFIG, prompt, fresh=not overwrite)
        return (_to_peft if to == "peft" else _to_tokens)(model, SoftPrompt.load(prompt), output)
    if to in LAYOUTS:
        raise CTPError(
            f"{to} has no place for a prompt: export the model without --prompt, the prompt to peft or tokens"
        )
    if to in PROMPTS:
        raise CTPError(f"{to} is for a prompt: name its folder with --prompt")
    raise CTPError(f"nothing is exported to {to!r}: choose {', '.join(LAYOUTS)}, or with --prompt {', '.join(PROMPTS)}")


def _to_peft(model: str, prompt: SoftPrompt, output: Path) -> dict[str, Any]:
    """PEFT's prompt-tuning folder, with the model named that the prompt is for."""
    prompt.embeds_for(load_model(model)[0])
    prompt.save(output, model)
    return {"layout": "peft", "tokens": len(prompt), "base_model": model}


def _to_tokens(model: str, prompt: SoftPrompt, output: Path) -> dict[str, Any]:
    """A hard prompt: for every row of the prompt the word embedding at the least angle, as a prompt folder of its own
    (so that its perplexity can be measured) and, as ids and text, in `tokens.json`."""
    net, tokenizer = load_model(model)
    rows = prompt.embeds_for(net)[0].float()
    table = embedding_table(net).float()
    cosine, ids = (torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(table).T).max(-1)
    result = {
        "layout": "tokens",
        "ids": ids.tolist(),
        "text": tokenizer.decode(ids.tolist()),
        "cosine": cosine.tolist(),
        "mean_cosine": cosine.mean().item(),
    }
    info = {"init": "tokens", "tokens": len(ids), "from": prompt.info}
    with staged_folder(output, CONFIG) as staging:
        SoftPrompt(table[ids], info).write(staging, model)
        write_json(staging / TOKENS, result)
    return result
