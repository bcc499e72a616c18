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

STATE = "state.safetensors"
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


def save(state: State, settings: dict[str, Any], work: Path) -> None:
    """One file, put in place by a rename, so that a killed run leaves a whole state."""
    work.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(state, name).contiguous() for name in TENSORS}
    plain = {"step": state.step, "best_valid": state.best_valid, "seconds": state.seconds, "history": state.history}
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
    now = json.loads(json.dumps(settings))
    differ = [key for key in now if before.get(key) != now[key]]
    if differ:
        raise CTPError(
            f"{path} belongs to a run with another {', '.join(differ)}: use the same, or start without resume"
        )
    return State(**tensors, **plain)


def lines(history: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in history)
