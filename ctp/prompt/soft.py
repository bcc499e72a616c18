"""The soft prompt: P embeddings in front of the text, as a PEFT prompt-tuning folder on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ctp_kernels.errors import CTPError
from ctp_kernels.files import staged_folder, write_json

WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "training.json"
KEY = "prompt_embeddings"
INITS = ("vocab", "mean", "text:<words>")


@dataclass
class SoftPrompt:
    """embeddings fp32 (P, width), in the width of the word embeddings; info: how it was made, plain JSON."""

    embeddings: torch.Tensor
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    def embeds_for(self, model: nn.Module) -> torch.Tensor:
        """The prompt as the model's inputs_embeds (1, P, width), in its dtype and on its device.

        Raises CTPError for a model of another width.
        """
        table = embedding_table(model)
        if self.embeddings.shape[1] != table.shape[1]:
            raise CTPError(
                f"the prompt has width {self.embeddings.shape[1]}, but {type(model).__name__} embeds words in "
                f"{table.shape[1]}: use a prompt trained for this width"
            )
        return self.embeddings.to(table.device, table.dtype).unsqueeze(0)

    def save(self, folder: str | Path, base_model: str = "") -> None:
        """Write the PEFT folder in one rename. `base_model` is a hub name or a path, of which the last part is kept."""
        with staged_folder(folder, CONFIG) as staging:
            self.write(staging, base_model)

    def write(self, folder: Path, base_model: str = "") -> None:
        """Write the PEFT files and `training.json` into an existing folder."""
        save_file({KEY: self.embeddings.detach().float().cpu().contiguous()}, folder / WEIGHTS)
        name = base_model.rstrip("/").rsplit("/", 1)[-1] if Path(base_model).exists() else base_model
        write_json(folder / CONFIG, {
            "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "inference_mode": True,
            "num_virtual_tokens": len(self), "base_model_name_or_path": name,
        })  # fmt: skip
        write_json(folder / RECORD, {**self.info, "sha256": _sha256(folder / WEIGHTS)})

    @staticmethod
    def load(folder: str | Path) -> SoftPrompt:
        """Read a PEFT prompt-tuning folder, ours or PEFT's own.

        Raises CTPError where a file is missing, truncated, changed since it was written (ours), of another kind,
        or holds NaN. The sizes are compared before anything is allocated.
        """
        folder = Path(folder)
        if not (folder / WEIGHTS).is_file():
            raise CTPError(f"{folder} is not a prompt folder: it has no {WEIGHTS}")
        config = _read_json(folder / CONFIG)
        record = _read_json(folder / RECORD) if (folder / RECORD).exists() else {}
        tokens = config.get("num_virtual_tokens")
        if config.get("peft_type") != "PROMPT_TUNING" or not isinstance(tokens, int):
            raise CTPError(f"{folder / CONFIG} does not describe prompt tuning")
        try:
            with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        except (safetensors.SafetensorError, OSError) as error:
            raise CTPError(f"{folder / WEIGHTS} is damaged: {error}") from error
        shape = shapes.get(KEY)
        if shape is None or len(shape) != 2 or shape[0] != tokens or 0 in shape:
            raise CTPError(f"{folder / WEIGHTS} has no {KEY} of {tokens} rows (it holds {shapes})")
        recorded = record.pop("sha256", None)
        if recorded is not None and recorded != _sha256(folder / WEIGHTS):
            raise CTPError(f"{folder / WEIGHTS} was changed after it was written: its SHA-256 is not the recorded one")
        embeddings = load_file(folder / WEIGHTS)[KEY]
        if not embeddings.is_floating_point() or not torch.isfinite(embeddings).all():
            raise CTPError(f"{folder / WEIGHTS} holds values that are not finite numbers")
        return SoftPrompt(embeddings.float(), record)


def init_prompt(model: nn.Module, tokens: int, init: str = "vocab", seed: int = 0, tokenizer: Any = None) -> SoftPrompt:
    """A prompt before training.

    `vocab`: rows of the embedding table, drawn at random without repeats (with, when the table is smaller);
    `mean`: the mean row, with noise of a tenth of the table's spread so that the rows can part;
    `text:<words>`: the embeddings of a text, repeated or cut to `tokens`.
    """
    if tokens < 1:
        raise CTPError(f"a prompt of {tokens} tokens is no prompt: use 1 or more")
    table = embedding_table(model).detach().float().cpu()
    generator = torch.Generator().manual_seed(seed)
    if init == "vocab":
        order = torch.cat([torch.randperm(len(table), generator=generator) for _ in range(-(-tokens // len(table)))])
        rows = table[order[:tokens]]
    elif init == "mean":
        rows = table.mean(0) + 0.1 * table.std(0) * torch.randn(tokens, table.shape[1], generator=generator)
    elif init.startswith("text:"):
        if tokenizer is None:
            raise CTPError("a prompt from text needs the model's tokenizer")
        ids = tokenizer(init[len("text:") :], add_special_tokens=False)["input_ids"]
        if not ids:
            raise CTPError("the text to start the prompt from has no tokens")
        rows = table[torch.tensor((ids * -(-tokens // len(ids)))[:tokens])]
    else:
        raise CTPError(f"no prompt initialisation is called {init!r}: choose {', '.join(INITS)}")
    return SoftPrompt(rows.clone(), {"init": init, "seed": seed, "tokens": tokens})


def embedding_table(model: nn.Module) -> torch.Tensor:
    """The word embeddings (vocabulary, width): for OPT-350M, narrower than the hidden state."""
    return model.get_input_embeddings().weight  # type: ignore[operator]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CTPError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise CTPError(f"{path} is not a JSON object")
    return data


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
