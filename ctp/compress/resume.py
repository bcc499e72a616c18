"""Finished blocks on disk, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ctp_kernels.errors import CTPError
from ctp_kernels.files import staged_folder, write_json
from ctp_kernels.format import FLOAT_DTYPES, parse_format
from ctp_kernels.packed import PackedWeight

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES.values()}


class Finished:
    """The folder of one run: `run.json` with its settings and fingerprint, and one folder per finished block.

        run.json                        {"fingerprint": sha256 over weights, windows and settings, "settings": {...}}
        block-0003/weights.safetensors  <layer>:<buffer>
        block-0003/layers.json          {"layers": {name: {"format", "shape", "dtype"}}, "rows": [...]}

    A block's folder appears whole or not at all. Raises CTPError when the folder belongs to another run.
    """

    def __init__(
        self, folder: str | Path, model: PreTrainedModel, windows: torch.Tensor | None, settings: dict[str, Any]
    ) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise CTPError(f"{self.folder} is a file, not a folder: choose another work folder")
        run = {"fingerprint": _fingerprint(model, windows, settings), "settings": settings}
        path = self.folder / "run.json"
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise CTPError(f"{self.folder} holds other files: choose another work folder")
            write_json(path, run)
        elif self._read(path).get("fingerprint") != run["fingerprint"]:
            raise CTPError(f"{self.folder} is of another run (model, windows or settings): remove it or choose another")

    def load(self, block: int) -> tuple[dict[str, PackedWeight], list[dict[str, Any]]] | None:
        """The packed layers and table rows of a block, or None where it is not finished."""
        folder = self.folder / f"block-{block:04d}"
        if not folder.is_dir():
            return None
        try:
            described = self._read(folder / "layers.json")
            tensors = load_file(folder / "weights.safetensors")
            packed = {}
            for name, layer in described["layers"].items():
                format, (n, k) = parse_format(layer["format"]), layer["shape"]
                buffers = {b: tensors[f"{name}:{b}"] for b in format.buffer_names}
                packed[name] = PackedWeight(format, (n, k), _DTYPES[layer["dtype"]], buffers)
                packed[name].validate()
            return packed, described["rows"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CTPError(f"{folder} is damaged ({error}): remove it, and the block is solved again") from error

    def save(self, block: int, packed: dict[str, PackedWeight], rows: list[dict[str, Any]]) -> None:
        tensors = {f"{name}:{b}": t.cpu() for name, weight in packed.items() for b, t in weight.buffers.items()}
        layers = {
            name: {"format": str(w.format), "shape": list(w.shape), "dtype": str(w.dtype).removeprefix("torch.")}
            for name, w in packed.items()
        }
        with staged_folder(self.folder / f"block-{block:04d}") as staging:
            save_file(tensors, staging / "weights.safetensors")
            write_json(staging / "layers.json", {"layers": layers, "rows": rows})

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CTPError(f"{path} cannot be read ({error}): remove its folder") from error
        if not isinstance(data, dict):
            raise CTPError(f"{path} is damaged: remove its folder")
        return data


def _fingerprint(model: PreTrainedModel, windows: torch.Tensor | None, settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(model.config.to_json_string().encode())
    tensors = dict(model.state_dict())
    if windows is not None:
        tensors["windows"] = windows
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
