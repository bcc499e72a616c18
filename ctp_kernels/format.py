"""A compressed weight is a pattern times a kind of value: `Format`, its name, its buffers.

| pattern        | which entries of a row are stored          |
|----------------|--------------------------------------------|
| `dense`        | all                                        |
| `sparse24`     | two of every four along K                  |
| `unstructured` | any; a bitmap says which                   |

| values                         | how each is written                                             |
|--------------------------------|-----------------------------------------------------------------|
| `fp16` `bf16` `fp32` (or none) | as a number (none: in the dtype of the weight)                  |
| `int8` `int4` `int3` `int2`    | as a code, with one scale (and, asymmetric, one zero) per group |

A group is `group_size` consecutive inputs (positions along K, counted before pruning), the last one
may be short; `group_size=None` is the whole row. The value of a code is `scale * (code - zero)`, where
a symmetric format has `zero = 2**(bits-1)` everywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch

from .errors import CTPError

PATTERNS = ("dense", "sparse24", "unstructured")
FLOAT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
INT_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
DEFAULT_GROUP = 128

_NAME = re.compile(
    r"(?:(?P<pattern>dense|sparse24|unstructured)(?:-|$))?(?P<values>int[2348]|fp16|bf16|fp32)?"
    r"(?:-(?:g(?P<group>\d+)|(?P<row>row)))?(?P<asym>-asym)?"
)


@dataclass(frozen=True)
class Format:
    """One point of the product. Use `parse_format` to get one from its name; `str(format)` is the name.

    `values` is None for "the weight's own dtype" (only before packing), `group_size` is None for one
    scale a row; for floating values `group_size` is None and `symmetric` True.
    """

    pattern: str = "dense"
    values: str | None = None
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise CTPError(f"unknown pattern {self.pattern!r}: one of {', '.join(PATTERNS)}")
        if self.values is not None and self.values not in FLOAT_DTYPES and self.values not in INT_BITS:
            raise CTPError(f"unknown values {self.values!r}: one of {', '.join((*INT_BITS, *FLOAT_DTYPES))}")
        if not self.quantized and (self.group_size is not None or not self.symmetric):
            raise CTPError(f"{self.values or 'floating'} values have no groups and no zeros: drop -g, -row and -asym")
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            raise CTPError(f"group size {self.group_size} is not a positive multiple of 8 (or -row for the whole row)")

    @property
    def quantized(self) -> bool:
        return self.values in INT_BITS

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        if self.values is None:
            raise CTPError(f"{self} has no width before it is packed: name fp16, bf16 or fp32")
        return INT_BITS[self.values] if self.quantized else FLOAT_DTYPES[self.values].itemsize * 8

    @cached_property
    def name(self) -> str:
        parts = [] if self.pattern == "dense" and self.values else [self.pattern]
        if self.values:
            parts.append(self.values)
        if self.quantized and self.group_size != DEFAULT_GROUP:
            parts.append("row" if self.group_size is None else f"g{self.group_size}")
        if not self.symmetric:
            parts.append("asym")
        return "-".join(parts)

    def __str__(self) -> str:
        return self.name

    def with_dtype(self, dtype: torch.dtype) -> Format:
        """The same format with floating values named: `sparse24` of a bf16 weight is `sparse24-bf16`."""
        if self.values is not None:
            return self
        for name, candidate in FLOAT_DTYPES.items():
            if candidate == dtype:
                return replace(self, values=name)
        raise CTPError(f"{self} cannot store {dtype} values: convert the weight to float32, bfloat16 or float16")

    def groups(self, k: int) -> int:
        """Scales per row of K inputs."""
        return 1 if self.group_size is None else -(-k // self.group_size)

    def row_entries(self, k: int) -> int:
        """Slots a row takes, a multiple of 8 (so that every row starts on a byte); not for unstructured."""
        return -(-(k // 2 if self.pattern == "sparse24" else k) // 8) * 8

    def constraint(self, shape: tuple[int, int]) -> str | None:
        """Why a weight of this (N, K) cannot take the format, or None where it can."""
        n, k = shape
        if n < 1 or k < 1:
            return f"a weight of shape ({n}, {k}) is empty"
        if self.pattern == "sparse24" and k % 4:
            return f"sparse24 keeps two of every four inputs, and K = {k} is not a multiple of 4"
        return None

    @cached_property
    def buffer_names(self) -> tuple[str, ...]:
        """The names of the tensors that hold a weight of this format, in files too."""
        names = ["codes" if self.quantized else "values"]
        if self.values == "int3":
            names.append("codes_hi")
        if self.pattern != "dense":
            names.append("mask")
        if self.pattern == "unstructured":
            names.append("row_offsets")
        if self.quantized:
            names.append("scales")
            if not self.symmetric:
                names.append("zeros")
        return tuple(names)

    @cached_property
    def kernel_names(self) -> tuple[str, ...]:
        """`buffer_names`, then what is computed from them in memory, in the order kernels take them."""
        return (*self.buffer_names, "tile_offsets") if self.pattern == "unstructured" else self.buffer_names


@cache
def parse_format(name: str) -> Format:
    """The format of a name such as `int4`, `sparse24-bf16`, `unstructured-int3-g64-asym`, `int3-row`."""
    match = _NAME.fullmatch(name) if name else None
    if match is None:
        raise CTPError(
            f"unknown format {name!r}: [dense|sparse24|unstructured][-int8|-int4|-int3|-int2|-fp16|-bf16|-fp32]"
            f"[-g<size>|-row][-asym], for example {', '.join(list(FORMATS)[:4])} or int3-g64-asym"
        )
    values, pattern = match["values"], match["pattern"] or "dense"
    grouped = values in INT_BITS
    if match["group"] is None:
        group = DEFAULT_GROUP if grouped and not match["row"] else None
    else:
        group = int(match["group"])
    if not grouped and match["row"]:
        raise CTPError(f"{name!r}: floating values have no scales, drop -row")
    return Format(pattern, values, group, match["asym"] is None)


def as_format(format: Format | str) -> Format:
    return format if isinstance(format, Format) else parse_format(format)


def _table() -> dict[str, Format]:
    contract = ("int4", "int3", "int2", "int8", "sparse24", "unstructured")
    joint = ("sparse24-int4", "sparse24-int3", "unstructured-int4", "unstructured-int3")
    rest = [
        Format(pattern, values, DEFAULT_GROUP if values in INT_BITS else None).name
        for pattern in PATTERNS
        for values in (*INT_BITS, *FLOAT_DTYPES)
    ]
    return {name: parse_format(name) for name in dict.fromkeys((*contract, *joint, *rest))}


#: Every pattern times every kind of value, at the default group size: name -> Format.
FORMATS: dict[str, Format] = {}
FORMATS.update(_table())
