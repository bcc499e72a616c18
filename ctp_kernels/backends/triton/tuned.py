"""Measured plans: tuned.json beside this file (shipped, per GPU), and what `ctp warmup --tune` found on this machine.

    {"version": 1, "gpus": {"NVIDIA H200": {"int4|bfloat16|16|4096x4096|forward": {"kind": "tile", ...}}}}

The user's file lies in ~/.cache/ctp_kernels/triton_tuned.json and goes before the shipped one. A damaged file is named
in an error, not passed over.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

from ...errors import CTPError
from ...files import write_json
from ...format import Format

VERSION = 1
SHIPPED = Path(__file__).with_name("tuned.json")
_FIELDS = {"kind": str, "block_n": int, "block_m": int, "block_k": int, "splits": int, "warps": int, "stages": int}


def user_file() -> Path:
    return Path.home() / ".cache" / "ctp_kernels" / "triton_tuned.json"


def key(format: Format, dtype: torch.dtype, rows: int, shape: tuple[int, int], direction: str) -> str:
    return f"{format}|{str(dtype).removeprefix('torch.')}|{rows}|{shape[0]}x{shape[1]}|{direction}"


def read(path: Path) -> dict[str, dict[str, dict]]:
    """{gpu: {key: plan}}; empty where there is no file. Raises CTPError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            return {}  # of another release: measure again
        for plans in data["gpus"].values():
            for plan in plans.values():
                if {name: type(value) for name, value in plan.items()} != _FIELDS:
                    raise ValueError(f"{plan} is no plan")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CTPError(f"{path} is damaged ({error}): delete it, and run ctp warmup --tune again") from error
    return data["gpus"]


@cache
def _table(gpu: str) -> dict[str, dict]:
    return {**read(SHIPPED).get(gpu, {}), **read(user_file()).get(gpu, {})}


def lookup(gpu: str, name: str) -> dict | None:
    return _table(gpu).get(name)


def remember(gpu: str, plans: dict[str, dict]) -> None:
    """Add plans to the user's file, and use them from now on."""
    from .plan import plan_for

    gpus = read(user_file())
    gpus[gpu] = {**gpus.get(gpu, {}), **plans}
    user_file().parent.mkdir(parents=True, exist_ok=True)
    write_json(user_file(), {"version": VERSION, "gpus": gpus})
    _table.cache_clear()
    plan_for.cache_clear()
