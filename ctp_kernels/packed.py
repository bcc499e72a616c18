"""`PackedWeight`: the packed bytes of one weight, and the plain PyTorch that writes and reads them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .errors import CTPError
from .format import FLOAT_DTYPES, Format, as_format
from .patterns import POPCOUNT, bytes_to_mask, gather_rows, magnitude24, mask_to_bytes, scatter_rows, tile_offsets
from .values import PLANES, codes_to_planes, dequantize, minmax_grid, planes_to_codes, quantize


@dataclass
class PackedWeight:
    """A weight (N, K) in packed form.

    `buffers` holds the tensors that `format.buffer_names` names:

    | name          | dtype          | shape                                                          |
    |---------------|----------------|----------------------------------------------------------------|
    | `values`      | fp16/bf16/fp32 | (slots,)                                                       |
    | `codes`       | uint8          | (slots * width / 8,), width 8, 4, 2, and 2 for int3's low bits  |
    | `codes_hi`    | uint8          | (slots / 8,), int3's high bit                                   |
    | `mask`        | uint8          | (N, ceil(K / 8))                                               |
    | `row_offsets` | int32          | (N + 1,), in units of 8 slots                                  |
    | `scales`      | fp16 or fp32   | (N, groups)                                                    |
    | `zeros`       | uint8          | (N, groups)                                                    |

    `slots` is N * format.row_entries(K), or 8 * row_offsets[N] for unstructured. `dtype` is what `unpack` returns.
    The layouts are drawn in `patterns.py` and `values.py`. The buffers are what files hold; for unstructured weights
    `tensors` adds `tile_offsets`, a quarter of a bit a weight, computed when first asked for.
    """

    format: Format
    shape: tuple[int, int]
    dtype: torch.dtype
    buffers: dict[str, torch.Tensor]
    _tile_offsets: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What kernels take: the tensors that `format.kernel_names` names."""
        tensors = [self.buffers[name] for name in self.format.buffer_names]
        if self.format.pattern == "unstructured":
            if self._tile_offsets is None:
                self._tile_offsets = tile_offsets(self.buffers["mask"])
            tensors.append(self._tile_offsets)
        return tensors

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.buffers.values())

    @property
    def bits_per_weight(self) -> float:
        """All stored bits, scales, zeros, masks and offsets included, over N * K."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def slots(self) -> int:
        if self.format.pattern == "unstructured":
            return 8 * int(self.buffers["row_offsets"][-1])
        return self.shape[0] * self.format.row_entries(self.shape[1])

    def to(self, device: torch.device | str) -> PackedWeight:
        moved = {name: tensor.to(device) for name, tensor in self.buffers.items()}
        return PackedWeight(self.format, self.shape, self.dtype, moved)

    def mask(self) -> torch.Tensor:
        """bool (N, K): which entries are stored."""
        n, k = self.shape
        if self.format.pattern == "dense":
            return torch.ones(n, k, dtype=torch.bool, device=self.tensors[0].device)
        return bytes_to_mask(self.buffers["mask"], k)

    def codes(self) -> torch.Tensor:
        """uint8 (N, K): the code of every stored entry, 0 elsewhere. Only for int values."""
        planes = [self.buffers[name] for name in ("codes", "codes_hi") if name in self.buffers]
        return self._to_rows(planes_to_codes(planes, str(self.format.values)))

    def unpack(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight (N, K) that the kernels multiply with, computed in fp32 and cast once to `dtype`."""
        if self.format.quantized:
            dense = dequantize(self.codes(), self.buffers["scales"], self.buffers.get("zeros"), self.format)
            if self.format.pattern != "dense":
                dense = torch.where(self.mask(), dense, 0.0)
        else:
            dense = self._to_rows(self.buffers["values"])
        return dense.to(dtype or self.dtype)

    def validate(self) -> None:
        """Check every dtype, shape, offset and count, so that no kernel can read out of bounds.

        Raises CTPError naming the buffer. Non-finite scales and values are refused too.
        """
        check_buffers(self)

    def _row_starts(self) -> torch.Tensor:
        n, k = self.shape
        if self.format.pattern == "unstructured":
            return self.buffers["row_offsets"][:-1].long() * 8
        return torch.arange(n, device=self.tensors[0].device) * self.format.row_entries(k)

    def _to_rows(self, stored: torch.Tensor) -> torch.Tensor:
        n, k = self.shape
        if self.format.pattern == "dense":
            return stored.view(n, -1)[:, :k]
        return scatter_rows(stored, self.mask(), self._row_starts())


def pack(weight: torch.Tensor, format: Format | str) -> PackedWeight:
    """Pack a dense (N, K) weight the plainest way: nearest codes on a min/max grid, largest magnitudes of four.

    A weight that already lies on the pattern keeps every non-zero: `sparse24` keeps the two largest
    magnitudes of each quad, `unstructured` every non-zero. The better ways to choose masks and codes are in
    `ctp.compress`, which hands them to `pack_codes` or `pack_values`.
    """
    format = as_format(format).with_dtype(weight.dtype)
    _check_dense(weight, format)
    weight = weight.detach()
    mask = _plain_mask(weight, format)
    if not format.quantized:
        return pack_values(weight, format, mask)
    exact = weight.float() if mask is None else weight.float() * mask
    scales, zeros = minmax_grid(exact, format)
    return pack_codes(quantize(exact, scales, zeros, format), scales, zeros, format, mask, weight.dtype)


def pack_values(weight: torch.Tensor, format: Format | str, mask: torch.Tensor | None = None) -> PackedWeight:
    """Pack (N, K) floating values; `mask` bool (N, K) says which are stored, others are dropped."""
    format = as_format(format).with_dtype(weight.dtype)
    _check_dense(weight, format)
    stored = weight.detach().to(FLOAT_DTYPES[str(format.values)])
    if not torch.isfinite(stored).all():
        raise CTPError(f"the weight has values that {format.values} cannot hold: use bf16 or fp32 values")
    dtype = weight.dtype if weight.dtype in FLOAT_DTYPES.values() else stored.dtype
    slots, buffers = _lay_out(stored, mask, format)
    return PackedWeight(format, (weight.shape[0], weight.shape[1]), dtype, {"values": slots, **buffers})


def pack_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: Format | str,
    mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> PackedWeight:
    """Pack integer codes as they are: the solver's codes are never rounded again.

    codes (N, K) integers in [0, 2^bits); scales (N, groups) fp16 or fp32; zeros (N, groups) integers, or None when
    symmetric; mask bool (N, K) for the sparse patterns; `dtype` is what `unpack` will return.
    """
    format = as_format(format)
    if not format.quantized:
        raise CTPError(f"{format} has no codes: use pack_values")
    if (zeros is None) != format.symmetric:
        raise CTPError(f"{format} {'takes no' if format.symmetric else 'needs'} zeros")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**format.bits):
        raise CTPError(f"codes outside [0, {2**format.bits}) do not fit {format}")
    if zeros is not None and zeros.numel() and (int(zeros.min()) < 0 or int(zeros.max()) >= 2**format.bits):
        raise CTPError(f"zeros outside [0, {2**format.bits}) do not fit {format}")
    n, k = codes.shape
    slots, buffers = _lay_out(codes.to(torch.uint8), mask, format)
    planes = codes_to_planes(slots, str(format.values))
    buffers = dict(zip(("codes", "codes_hi"), planes, strict=False)) | buffers
    buffers["scales"] = scales.contiguous()
    if zeros is not None:
        buffers["zeros"] = zeros.to(torch.uint8).contiguous()
    packed = PackedWeight(format, (n, k), dtype, buffers)
    packed.validate()
    return packed


def _check_dense(weight: torch.Tensor, format: Format) -> None:
    if weight.ndim != 2:
        raise CTPError(f"a weight has two dimensions (N, K), not shape {tuple(weight.shape)}")
    reason = format.constraint((weight.shape[0], weight.shape[1]))
    if reason:
        raise CTPError(f"{format} does not fit: {reason}")
    if not torch.isfinite(weight).all():
        raise CTPError("the weight holds NaN or infinite values: the checkpoint is damaged")


def _plain_mask(weight: torch.Tensor, format: Format) -> torch.Tensor | None:
    if format.pattern == "dense":
        return None
    return magnitude24(weight) if format.pattern == "sparse24" else weight != 0


def _lay_out(
    dense: torch.Tensor, mask: torch.Tensor | None, format: Format
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The slots of an (N, K) tensor under a pattern, and the pattern's own buffers."""
    n, k = dense.shape
    reason = format.constraint((n, k))
    if reason:
        raise CTPError(f"{format} does not fit: {reason}")
    if format.pattern == "dense":
        return torch.nn.functional.pad(dense, (0, format.row_entries(k) - k)).reshape(-1).contiguous(), {}
    if mask is None:
        raise CTPError(f"{format} needs a mask (bool, {n} x {k})")
    bitmap = mask_to_bytes(mask)
    if format.pattern == "sparse24":
        if not bool((mask.view(n, k // 4, 4).sum(-1) == 2).all()):
            raise CTPError("a sparse24 mask keeps exactly two of every four inputs")
        stride = format.row_entries(k)
        starts = torch.arange(n, device=dense.device) * stride
        return gather_rows(dense, mask, starts, n * stride), {"mask": bitmap}
    eights = -(-mask.sum(1) // 8)
    row_offsets = torch.nn.functional.pad(eights.cumsum(0), (1, 0))
    if int(row_offsets[-1]) >= 2**31:
        raise CTPError("an unstructured weight holds at most 2^34 entries")
    slots = gather_rows(dense, mask, row_offsets[:-1] * 8, 8 * int(row_offsets[-1]))
    return slots, {"mask": bitmap, "row_offsets": row_offsets.to(torch.int32)}


def check_buffers(packed: PackedWeight) -> None:
    """See `PackedWeight.validate`."""
    format, (n, k), buffers = packed.format, packed.shape, packed.buffers
    reason = format.constraint((n, k))
    if reason:
        raise CTPError(f"{format} does not fit: {reason}")
    if format.values is None:
        raise CTPError(f"{format} names no kind of value: a packed weight is {format}-fp16, -bf16 or -fp32")
    missing, extra = set(format.buffer_names) - set(buffers), set(buffers) - set(format.buffer_names)
    if missing or extra:
        raise CTPError(f"{format} weight has missing buffers {sorted(missing)}, unknown buffers {sorted(extra)}")

    def expect(name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
        tensor = buffers[name]
        if tensor.dtype not in dtypes or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise CTPError(
                f"buffer {name!r} of a {format} weight ({n}, {k}) must be contiguous {wanted} {shape}, "
                f"not {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            )

    if format.pattern != "dense":
        expect("mask", (torch.uint8,), (n, -(-k // 8)))
        counts = POPCOUNT.to(buffers["mask"].device)[buffers["mask"].long()]
        if k % 8 and bool((buffers["mask"][:, -1] >> (k % 8)).any()):
            raise CTPError(f"buffer 'mask' of a {format} weight marks inputs beyond K = {k}")
        if format.pattern == "sparse24":
            quads = torch.stack([buffers["mask"] & 15, buffers["mask"] >> 4], -1).view(n, -1)[:, : k // 4]
            if bool((POPCOUNT.to(quads.device)[quads.long()] != 2).any()):
                raise CTPError("buffer 'mask' of a sparse24 weight must mark exactly two of every four inputs")
        else:
            expect("row_offsets", (torch.int32,), (n + 1,))
            offsets = buffers["row_offsets"].long()
            wanted = torch.nn.functional.pad((-(-counts.sum(1, dtype=torch.int64) // 8)).cumsum(0), (1, 0))
            if not torch.equal(offsets, wanted):
                raise CTPError("buffer 'row_offsets' does not agree with the bits of 'mask'")
    slots = packed.slots
    if not format.quantized:
        expect("values", (FLOAT_DTYPES[str(format.values)],), (slots,))
        if not torch.isfinite(buffers["values"]).all():
            raise CTPError(f"buffer 'values' of a {format} weight holds NaN or infinite numbers")
        return
    for name, width in zip(("codes", "codes_hi"), PLANES[str(format.values)], strict=False):
        expect(name, (torch.uint8,), (slots * width // 8,))
    expect("scales", (torch.float16, torch.float32), (n, format.groups(k)))
    if not torch.isfinite(buffers["scales"]).all():
        raise CTPError(f"buffer 'scales' of a {format} weight holds NaN or infinite numbers")
    if not format.symmetric:
        expect("zeros", (torch.uint8,), (n, format.groups(k)))
        if int(buffers["zeros"].max()) >= 2**format.bits:
            raise CTPError(f"buffer 'zeros' of a {format} weight holds a zero outside [0, {2**format.bits})")
