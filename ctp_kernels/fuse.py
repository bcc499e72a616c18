"""q, k, v and gate, up in one launch: layers that read the same input run as one matrix of all their rows.

At 4096 x 4096 and one row a launch costs as much as the bytes, so three launches in one are worth more than another
bit per weight. Every part stays a PackedLinear under its own name, and its buffers are views of the group's: state
dicts, checkpoints, `unpatch_model` and `explain` see what they would see without fusing, and no byte is held twice
(but an unstructured group's offsets, which count from the group's first row).

The parts are called one by one with the same tensor. The first call multiplies for all of them and keeps the other
parts' outputs until they are asked for with that very tensor, unchanged since, and in the same grad mode; any other
input is multiplied anew. So no assumption is made about the order of the calls, and a model that calls only some
parts is right, if slower. The parts share one graph, so that their outputs go backward together, as a model's loss
does: backward() of one and then of another part's output needs retain_graph. (Under torch.compile and inference_mode
a tensor's version cannot be read: there, changing the input in place between two parts' calls would go unseen. No
model of transformers does.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from . import ops
from .patterns import tile_offsets

if TYPE_CHECKING:
    from .linear import PackedLinear

#: Names, within one parent module, of layers that read the same input.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Pending(NamedTuple):
    """Outputs for an input that not all parts have asked for yet."""

    x: torch.Tensor
    version: int
    grad: bool
    outputs: list[torch.Tensor | None]


class FusedGroup:
    """Parts (PackedLinear, one format and width) that run as one weight of shape (sum of their N, K)."""

    def __init__(self, parts: list[PackedLinear]) -> None:
        self.parts = parts
        self.tensors: list[torch.Tensor] | None = None
        self._pending: _Pending | None = None
        self._product = ops.Product()
        for place, part in enumerate(parts):
            part.group, part.place = self, place
        self.refresh()

    @property
    def rows(self) -> list[int]:
        return [part.out_features for part in self.parts]

    def dissolve(self) -> None:
        """Let every part run alone again."""
        for part in self.parts:
            part.group = None

    def refresh(self) -> None:
        """Gather the parts' buffers, and make the parts' views of them; called whenever a part's have changed.

        Where the parts differ (in the midst of a `.to()`, of which each part hears in turn) they run alone.
        """
        self._pending = None
        for product in (self._product, *(part._product for part in self.parts)):
            product.forget()  # what they were bound to keeps memory
        if not _alike(self.parts):
            self.tensors = None
            return
        names = self.parts[0].format.kernel_names
        own = [name for name in names if name not in ("row_offsets", "tile_offsets")]
        if self.tensors is not None and all(self._is_view(name) for name in own):
            gathered = dict(zip(names, self.tensors, strict=True))
        else:
            gathered = {name: self._gather(name) for name in own}
        if "row_offsets" in names:  # no views: anew, also where a state dict was copied into the same memory
            gathered["row_offsets"] = _join_offsets([part.get_buffer("row_offsets") for part in self.parts])
            gathered["tile_offsets"] = tile_offsets(gathered["mask"])
        self.tensors = [gathered[name] for name in names]

    def bias(self) -> torch.Tensor | None:
        """The parts' biases joined, anew at each call: whoever copies a model gives its parameters new memory."""
        biases: list[torch.Tensor] = [part.bias for part in self.parts if part.bias is not None]
        return torch.cat(biases) if biases else None

    def run(self, part: PackedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """The part's y (..., N), or None where it is to run alone."""
        if self.tensors is None:
            return None
        pending = self._pending
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        if (
            pending is None
            or pending.x is not x
            or (pending.version, pending.grad) != (version, torch.is_grad_enabled())
            or pending.outputs[part.place] is None
        ):
            y = self._product(x, self.tensors, self.bias(), part.format, sum(self.rows), part.backend, part.compute)
            pending = self._pending = _Pending(x, version, torch.is_grad_enabled(), list(y.split(self.rows, dim=-1)))
        output, pending.outputs[part.place] = pending.outputs[part.place], None
        if all(left is None for left in pending.outputs):
            self._pending = None
        return output

    def _gather(self, name: str) -> torch.Tensor:
        tensors = [part.get_buffer(name) for part in self.parts]
        whole = torch.cat(tensors)
        for part, piece in zip(self.parts, whole.split([len(t) for t in tensors]), strict=True):
            part._buffers[name] = piece
        return whole

    def _is_view(self, name: str) -> bool:
        assert self.tensors is not None
        whole = self.tensors[self.parts[0].format.kernel_names.index(name)]
        return _covers(whole, [part.get_buffer(name) for part in self.parts])


def _covers(whole: torch.Tensor, pieces: Iterable[torch.Tensor]) -> bool:
    """Whether the pieces are `whole`'s memory, one after the other, to its end."""
    at = whole.data_ptr()
    for piece in pieces:
        if piece.data_ptr() != at or piece.dtype != whole.dtype or piece.device != whole.device:
            return False
        at += piece.nbytes
    return at == whole.data_ptr() + whole.nbytes


def _alike(parts: list[PackedLinear]) -> bool:
    """Whether the parts make one weight: format, width, dtypes, device, bias or none, backend and compute.

    Parts whose inputs have an order of their own do not.
    """
    if any(part.input_order is not None for part in parts):
        return False

    def kind(part: PackedLinear) -> tuple:
        tensors = [part.get_buffer(name) for name in part.format.kernel_names]
        bias = None if part.bias is None else (part.bias.dtype, part.bias.device)
        where = tuple((t.dtype, t.device) for t in tensors)
        return part.format, part.in_features, part.backend, part.compute, bias, where

    return len({kind(part) for part in parts}) == 1


def _join_offsets(offsets: list[torch.Tensor]) -> torch.Tensor:
    joined, first = [offsets[0][:1]], 0
    for own in offsets:
        joined.append(own[1:] + first)
        first += int(own[-1])
    return torch.cat(joined)


def fuse(model: nn.Module, wanted: Callable[[PackedLinear], bool] = lambda layer: True) -> list[list[str]]:
    """Fuse the model's packed layers that read the same input, where all of them are `wanted`; return their names.

    Groups that there were are dissolved first. A group of which one part is missing, or of another format, is left.
    """
    from .linear import PackedLinear

    for module in list(model.modules()):
        if isinstance(module, PackedLinear) and module.group is not None:
            module.group.dissolve()
    fused = []
    for name, parent in model.named_modules():
        children = dict(parent.named_children())
        for together in TOGETHER:
            parts = [children.get(leaf) for leaf in together]
            packed = [part for part in parts if isinstance(part, PackedLinear) and wanted(part)]
            if len(packed) == len(together) and len(set(packed)) == len(packed) and _alike(packed):
                FusedGroup(packed)
                fused.append([f"{name}.{leaf}" if name else leaf for leaf in together])
    return fused
