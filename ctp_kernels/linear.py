"""`PackedLinear`: a Linear layer that runs its packed weight and knows no format by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import ops
from .errors import CTPError
from .format import FLOAT_DTYPES
from .fuse import FusedGroup
from .packed import PackedWeight
from .patterns import tile_offsets


class PackedLinear(nn.Module):
    """y (..., N) = x (..., K) W^T + bias, from the packed bytes, in x's dtype; backward gives dx (and dbias) only.

    The buffers carry the names of `PackedWeight.buffers`, so `state_dict` holds `<layer>.codes`, `<layer>.scales`, ...
    Casting the module (`.to(bf16)`, `.half()`) casts the bias and floating `values`, as for nn.Linear; codes, masks,
    scales and zeros never change. `.double()` leaves `values` in fp32, which fp64 activations widen exactly.

    `order` int32 (K,), where a checkpoint's groups are no runs of inputs (GPTQ's act-order): input k of the packed
    weight is x[..., order[k]]. It is the buffer `input_order`; such a layer is never fused with others.
    """

    bias: nn.Parameter | None
    input_order: torch.Tensor | None
    #: The layers that this one runs together with, if any, and its place among them (see fuse.py).
    group: FusedGroup | None = None
    place: int = 0

    def __init__(
        self,
        packed: PackedWeight,
        bias: torch.Tensor | None = None,
        backend: str = "auto",
        compute: str = "exact",
        order: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        packed.validate()
        check_order(order, packed.shape[1])
        self.format, self.dtype, self.backend, self.compute = packed.format, packed.dtype, backend, compute
        self.out_features, self.in_features = packed.shape
        self._product = ops.Product()
        for name, tensor in zip(packed.format.kernel_names, packed.tensors, strict=True):
            self.register_buffer(name, tensor, persistent=name in packed.format.buffer_names)
        self.register_buffer("input_order", order)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def packed(self) -> PackedWeight:
        """The weight as a PackedWeight that shares this layer's buffers."""
        buffers = {name: self.get_buffer(name) for name in self.format.buffer_names}
        return PackedWeight(
            self.format, (self.out_features, self.in_features), self.dtype, buffers, self._buffers.get("tile_offsets")
        )

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight (N, K), unpacked anew at each access: right but slow, for models that look at a layer's
        weight (T5 asks for its dtype). No product uses it."""
        unpacked, order = self.packed.unpack(), self._buffers["input_order"]
        return unpacked if order is None else unpacked[:, torch.argsort(order)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            raise CTPError(f"x of shape {tuple(x.shape)} does not fit a layer of {self.in_features} inputs")
        order = self._buffers["input_order"]
        if order is not None:
            x = _InOrder.apply(x, order)
        if self.group is not None:
            y = self.group.run(self, x)
            if y is not None:
                return y
        tensors: Any = [self._buffers[name] for name in self.format.kernel_names]
        bias = self._parameters["bias"]
        return self._product(x, tensors, bias, self.format, self.out_features, self.backend, self.compute)

    def extra_repr(self) -> str:
        mode = "" if self.compute == "exact" else f", compute={self.compute}"
        return (
            f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}, format={self.format}{mode}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        self._product.forget()
        before = {name: self.get_buffer(name) for name in self.format.kernel_names}
        if self.input_order is not None:
            before["input_order"] = self.input_order
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype == old.dtype:
                continue
            names = {dtype: values for values, dtype in FLOAT_DTYPES.items()}
            if name == "values" and new.dtype in names:
                self.format = replace(self.format, values=names[new.dtype])
            else:
                self._buffers[name] = old.to(new.device)
        probe = fn(torch.empty(0, dtype=self.dtype, device=before[self.format.buffer_names[0]].device))
        if probe.dtype in FLOAT_DTYPES.values():
            self.dtype = probe.dtype
        if self.group is not None:
            self.group.refresh()
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Refuse damaged buffers before they replace sound ones: kernels trust what the layer holds."""
        self._product.forget()
        own = self.format.buffer_names
        found = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        try:
            check_order(state_dict.get(f"{prefix}input_order"), self.in_features)
            if found:  # a part of a weight is checked beside what the layer keeps
                device = next(iter(found.values())).device
                kept = {name: self.get_buffer(name).to(device) for name in own if name not in found}
                shape = (self.out_features, self.in_features)
                PackedWeight(self.format, shape, self.dtype, kept | found).validate()
        except CTPError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        for name, tensor in found.items():  # an unstructured weight may have another number of entries
            mine = self.get_buffer(name)  # and scales may be fp32 where these are fp16
            if tensor.shape != mine.shape or tensor.dtype != mine.dtype:
                self._buffers[name] = torch.empty_like(tensor, device=self.get_buffer(name).device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if "tile_offsets" in self.format.kernel_names and "mask" in found:
            self.tile_offsets = tile_offsets(self.get_buffer("mask"))
        if self.group is not None:
            self.group.refresh()


class _InOrder(torch.autograd.Function):
    """x[..., order] for a permutation: its gradient is gathered by the inverse, where index_select's would be added up
    (1024 x 4096 on two cores: 5 ms for 118)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (order,) = ctx.saved_tensors
        return _InOrder.apply(grad, torch.argsort(order).to(torch.int32)), None


def check_order(order: torch.Tensor | None, k: int) -> None:
    """Raise CTPError where `order` is not each of the K inputs once, int32 (K,)."""
    if order is None:
        return
    if order.dtype != torch.int32 or tuple(order.shape) != (k,):
        raise CTPError(f"buffer 'input_order' must be int32 ({k},), not {order.dtype} {tuple(order.shape)}")
    if not torch.equal(order.sort().values, torch.arange(k, dtype=torch.int32, device=order.device)):
        raise CTPError(f"buffer 'input_order' does not name each of {k} inputs once")
