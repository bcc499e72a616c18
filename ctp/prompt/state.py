"""What a training run is between two steps, and its file: safetensors with JSON in the header, no pickle."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from ctp_kernels.errors import CTPError

from .soft import WEIGHTS, SoftPrompt

STATE, LOG = "state.safetensors", "log.jsonl"
PERPLEXITY = "valid_perplexity"
TENSORS = ("relative", "best", "exp_avg", "exp_avg_sq")


@dataclass
class State:
    """All that a run is after `step` steps. relative, best, exp_avg, exp_avg_sq: fp32 (P, width)."""

    relative: torch.Tensor
    best: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int = 0
    best_valid: float = math.inf
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)  # losses of the steps since the last of the history


def save(state: State, settings: dict[str, Any], work: Path) -> None:
    """One file, put in place by a rename, so that a killed run leaves a whole state."""
    work.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(state, name).contiguous() for name in TENSORS}
    plain = {k: v for k, v in vars(state).items() if k not in TENSORS}
    temporary = work / (STATE + ".tmp")
    save_file(
        {k: v.clone() for k, v in tensors.items()},
        temporary,
        {"state": json.dumps(plain), "settings": json.dumps(settings)},
    )
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(work / STATE)


def resumed(work: Path, settings: dict[str, Any]) -> State | None:
    """The saved state, or None where there is none yet. Raises CTPError where it belongs to another run."""
    path = work / STATE
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            plain, before = json.loads(metadata["state"]), json.loads(metadata["settings"])
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except (safetensors.SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CTPError(f"{path} is damaged ({error}): remove it and start again without resume") from error
    _check_same(path, before, settings)
    return State(**tensors, **plain)


def finished(out: Path, settings: dict[str, Any]) -> tuple[SoftPrompt, list[dict[str, Any]]] | None:
    """The prompt and the history of a run that has ended, or None where there is no prompt at `out`.

    Raises CTPError where it belongs to another run.
    """
    if not (out / WEIGHTS).is_file():
        return None
    prompt = SoftPrompt.load(out)
    _check_same(out, prompt.info, settings)
    try:
        rows = [json.loads(line) for line in (out / LOG).read_text(encoding="utf-8").splitlines()]
        history = [{**row, PERPLEXITY: math.inf if row[PERPLEXITY] is None else row[PERPLEXITY]} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CTPError(f"{out / LOG} is damaged ({error}): start without resume") from error
    return prompt, history


def lines(history: list[dict[str, Any]]) -> str:
    """The log, a JSON object a line; a perplexity that is not finite is null, as JSON has no other word for it."""
    rows = [{**row, PERPLEXITY: row[PERPLEXITY] if math.isfinite(row[PERPLEXITY]) else None} for row in history]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _check_same(path: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    now = json.loads(json.dumps(settings))
    differ = [key for key in now if before.get(key) != now[key]]
    if differ:
        raise CTPError(
            f"{path} belongs to a run with another {', '.join(differ)}: use the same, or start without resume"
        )
