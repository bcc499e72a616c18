"""The inputs of a block, and the Hessians of its linears, for all calibration windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ctp.model import context_length, vocabulary_size
from ctp_kernels.errors import CTPError

from .hessian import Hessian


class _StopForward(Exception):
    """Raised by our own hooks to end a forward pass that has shown what it was run for."""


class Activations:
    """The activations of all windows on their way through the blocks; `hidden` holds one (batch, length, width) each.

    A block's other arguments (masks, rotary tables) do not change from batch to batch of one size, so they are
    recorded once per size, for every block: sliding-window models give blocks different masks.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: list[tuple[str, nn.Module]], windows: torch.Tensor, batch_size: int
    ) -> None:
        _check_windows(model, windows, batch_size)
        self.blocks = [block for _, block in blocks]
        self.names = [name for name, _ in blocks]
        self.hidden: list[torch.Tensor] = []
        self.rest: dict[int, list[tuple[tuple, dict[str, Any]]]] = {}
        batches = windows.to(model.device).split(batch_size)
        for batch in batches:
            recorded: list[tuple[tuple, dict[str, Any]]] = []
            whole = len(batch) not in self.rest

            def record(module, args, kwargs, recorded=recorded, whole=whole):
                if not recorded:
                    self.hidden.append(args[0])
                recorded.append((args[1:], kwargs))
                if not whole:
                    raise _StopForward

            hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in self.blocks]
            try:
                model.base_model(batch, use_cache=False)
            except _StopForward:
                pass
            finally:
                for hook in hooks:
                    hook.remove()
            if whole:
                self.rest[len(batch)] = recorded

    def hessians(self, index: int, groups: list[list[str]]) -> list[torch.Tensor]:
        """H of each group's common input, in one pass over the windows that ends at the last of these groups."""
        block = self.blocks[index]
        heads = [block.get_submodule(group[0]) for group in groups]
        sums = [Hessian(int(head.weight.shape[1]), head.weight.device) for head in heads]  # type: ignore

        def see(total: Hessian, last: bool):
            def hook(module, args):
                total.add(args[0])
                if last:
                    raise _StopForward

            return hook

        hooks = [
            head.register_forward_pre_hook(see(total, head is heads[-1]))
            for head, total in zip(heads, sums, strict=True)
        ]
        try:
            for batch in range(len(self.hidden)):
                try:
                    self._run(index, batch)
                except _StopForward:
                    continue
        finally:
            for hook in hooks:
                hook.remove()
        means = []
        for group, total in zip(groups, sums, strict=True):
            try:
                means.append(total.mean())
            except CTPError as error:
                raise CTPError(f"{self.names[index]}.{group[0]}: {error}") from error
        return means

    def advance(self, index: int) -> None:
        """Replace the activations by what the block makes of them."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self._run(index, batch)

    def _run(self, index: int, batch: int) -> torch.Tensor:
        hidden = self.hidden[batch]
        args, kwargs = self.rest[len(hidden)][index]
        out = self.blocks[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


def _check_windows(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> None:
    if windows.ndim != 2 or windows.dtype != torch.long or 0 in windows.shape:
        raise CTPError(f"windows must be int64 (count, length) token ids, not {windows.dtype} {tuple(windows.shape)}")
    if windows.shape[1] > context_length(model):
        raise CTPError(f"windows of {windows.shape[1]} tokens exceed the model's context of {context_length(model)}")
    low, high = int(windows.min()), int(windows.max())
    vocabulary = vocabulary_size(model)
    if low < 0 or high >= vocabulary:
        raise CTPError(f"windows hold token {low if low < 0 else high}, and the model knows 0 to {vocabulary - 1}")
    if batch_size < 1:
        raise CTPError(f"batch size {batch_size} is not positive")
