"""The product of patterns and values: names, sizes, constraints, and exact packing."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctp_kernels import FORMATS, CTPError, Format, PackedLinear, pack, pack_codes, pack_values, parse_format
from ctp_kernels.format import FLOAT_DTYPES, INT_BITS, PATTERNS
from tests.helpers import FORMAT_NAMES, weight_for

CONTRACT = ["int4", "int3", "int2", "int8", "sparse24", "unstructured",
            "sparse24-int4", "sparse24-int3", "unstructured-int4", "unstructured-int3"]  # fmt: skip


@pytest.mark.parametrize("base", CONTRACT)
def test_contract_names_with_every_suffix(base):
    assert base in FORMATS
    quantized = "int" in base
    for group, asym in itertools.product(("", "-g64", "-g128", "-row"), ("", "-asym")):
        if quantized:
            format = parse_format(base + group + asym)
            assert format.symmetric == (asym == "")
            assert format.group_size == {"": 128, "-g64": 64, "-g128": 128, "-row": None}[group]
        elif group or asym:
            with pytest.raises(CTPError):
                parse_format(base + group + asym)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_name_is_the_same_everywhere(name):
    assert parse_format(name).name == str(parse_format(name)) == name
    assert parse_format("int4-g128") == parse_format("int4")
    assert parse_format("sparse24").with_dtype(torch.bfloat16).name == "sparse24-bf16"


@pytest.mark.parametrize("name", ["", "int5", "int4-g7", "int4-g0", "x-int4", "int4-", "sparse24int4", "int4-asym-row"])
def test_unknown_names_are_refused_in_one_sentence(name):
    with pytest.raises(CTPError) as error:
        parse_format(name)
    assert "\n" not in str(error.value)


def test_table_is_the_whole_product():
    points = {(f.pattern, f.values) for f in FORMATS.values()}
    assert points >= set(itertools.product(PATTERNS, (*INT_BITS, *FLOAT_DTYPES)))


@pytest.mark.parametrize("values,expected", [("int8", 8), ("int4", 4), ("int3", 3), ("int2", 2)])
def test_codes_take_exactly_their_bits(values, expected):
    packed = pack(torch.randn(64, 1024), f"{values}-g128")
    codes = sum(packed.buffers[name].nbytes for name in ("codes", "codes_hi") if name in packed.buffers)
    assert codes * 8 == expected * 64 * 1024
    assert packed.bits_per_weight == expected + 16 / 128


def test_masks_take_one_bit_a_weight():
    packed = pack(torch.randn(64, 1024), "sparse24-int4-row")
    assert packed.buffers["mask"].nbytes * 8 == 64 * 1024
    assert packed.bits_per_weight == 1 + 4 / 2 + 16 / 1024
    weight = torch.randn(64, 1024) * (torch.rand(64, 1024) > 0.5)
    packed = pack(weight, "unstructured")
    assert packed.buffers["mask"].nbytes * 8 == 64 * 1024
    entries = torch.count_nonzero(weight).item()
    padding = packed.nbytes - (64 * 1024 // 8 + 65 * 4 + entries * 4)
    assert 0 <= padding < 64 * 8 * 4  # less than eight entries a row


def test_nbytes_counts_every_buffer():
    packed = pack(torch.randn(5, 172), "int3-g64-asym")
    assert packed.nbytes == 5 * 176 * 3 // 8 + 5 * 3 * 2 + 5 * 3
    assert packed.bits_per_weight == 8 * packed.nbytes / (5 * 172)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_codes_scales_zeros_and_mask_survive_packing(data):
    """Any codes, any mask, any shape: what goes in comes out bit for bit, and pruned entries are exactly zero."""
    format = parse_format(data.draw(st.sampled_from([n for n in FORMAT_NAMES if parse_format(n).quantized])))
    n, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 300))
    if format.pattern == "sparse24":
        k = -(-k // 4) * 4
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    codes = torch.randint(2**format.bits, (n, k), generator=generator, dtype=torch.uint8)
    shape = (n, format.groups(k))
    scales = (torch.rand(shape, generator=generator) + 0.1).to(
        data.draw(st.sampled_from([torch.float16, torch.float32]))
    )
    zeros = None if format.symmetric else torch.randint(2**format.bits, shape, generator=generator)
    mask = random_mask(format, n, k, generator)
    packed = pack_codes(codes, scales, zeros, format, mask)
    kept = torch.ones(n, k, dtype=torch.bool) if mask is None else mask
    assert torch.equal(packed.mask(), kept)
    assert torch.equal(packed.codes()[kept], codes[kept])
    group = torch.arange(k) // (format.group_size or k)
    zero = torch.full(shape, 2 ** (format.bits - 1)) if zeros is None else zeros
    expected = scales.float()[:, group] * (codes.float() - zero.float()[:, group]) * kept
    assert torch.equal(packed.unpack(), expected)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_floating_values_survive_packing(data):
    format = parse_format(data.draw(st.sampled_from([n for n in FORMAT_NAMES if not parse_format(n).quantized])))
    n, k = data.draw(st.integers(1, 9)), 4 * data.draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    format = format.with_dtype(torch.bfloat16)
    weight = torch.randn(n, k, generator=generator).to(FLOAT_DTYPES[str(format.values)])
    mask = random_mask(format, n, k, generator)
    expected = weight if mask is None else weight * mask
    packed = pack_values(weight, format, mask)
    packed.validate()
    assert torch.equal(packed.unpack(), expected)


def random_mask(format: Format, n: int, k: int, generator: torch.Generator) -> torch.Tensor | None:
    if format.pattern == "dense":
        return None
    noise = torch.rand(n, k, generator=generator)
    if format.pattern == "unstructured":
        return noise > torch.rand(n, 1, generator=generator)  # rows of every density
    kept = noise.view(n, k // 4, 4).argsort(-1)[..., :2]
    return torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(-1, kept, True).view(n, k)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_repacking_the_unpacked_weight_changes_nothing(name):
    format = parse_format(name)
    packed = pack(weight_for(format, 17, 172), name)
    unpacked = packed.unpack()
    mask = None if format.pattern == "dense" else packed.mask()
    if format.quantized:
        again = pack_codes(packed.codes(), packed.buffers["scales"], packed.buffers.get("zeros"), format, mask)
    else:
        again = pack(unpacked, name)
    assert torch.equal(again.unpack(), unpacked)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, packed.tensors, strict=True))


@pytest.mark.parametrize("name", ["int4-asym", "int3-row-asym", "sparse24-int4-asym", "int8", "int2-g8"])
def test_nearest_codes_are_within_half_a_step(name):
    format = parse_format(name)
    weight = torch.rand(9, 172) + 0.5 if not format.symmetric else torch.randn(9, 172)
    packed = pack(weight, name)
    group = torch.arange(172) // (format.group_size or 172)
    step = packed.buffers["scales"].float()[:, group]
    inside = packed.mask() & (packed.codes() < 2**format.bits - 1) & (packed.codes() > 0)
    error = (packed.unpack() - weight).abs()[inside]
    assert (error <= 0.501 * step[inside]).all()


def test_tiny_and_huge_scales_are_kept_in_fp32():
    packed = pack(torch.randn(4, 64) * 1e-7, "int8-row")
    assert packed.buffers["scales"].dtype == torch.float32
    assert (packed.unpack() - torch.zeros(4, 64)).abs().max() > 0
    assert pack(torch.randn(4, 64), "int8-row").buffers["scales"].dtype == torch.float16


def test_dense_weights_are_pruned_by_magnitude_and_patterns_kept_exactly():
    weight = torch.tensor([[3.0, -4.0, 1.0, 2.0, 0.0, 0.0, 5.0, 0.0]])
    assert pack(weight, "sparse24").unpack().tolist() == [[3.0, -4.0, 0.0, 0.0, 0.0, 0.0, 5.0, 0.0]]


@pytest.mark.parametrize(
    "weight,name",
    [
        (torch.randn(4, 6), "sparse24"),
        (torch.full((4, 8), float("nan")), "int4"),
        (torch.tensor([[float("inf")] * 8]), "unstructured"),
        (torch.randn(8), "int4"),
        (torch.empty(0, 8), "int4"),
        (torch.full((1, 8), 1e30), "fp16"),
        (torch.randn(4, 8, dtype=torch.float64), "sparse24"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weight, name):
    with pytest.raises(CTPError):
        pack(weight, name)


def damage(packed, name, change):
    packed.buffers[name] = change(packed.buffers[name].clone())
    return packed


def set_first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    "format,buffer,change",
    [
        ("int4", "codes", lambda t: t[:-1]),
        ("int4", "codes", lambda t: t.to(torch.int32)),
        ("int3", "codes_hi", lambda t: t[:-1]),
        ("int4", "scales", set_first(float("nan"))),
        ("int4", "scales", lambda t: t[:, :-1]),
        ("int4-asym", "zeros", set_first(16)),
        ("sparse24", "mask", set_first(0b00010111)),
        ("sparse24", "values", set_first(float("inf"))),
        ("unstructured", "row_offsets", set_first(7)),
        ("unstructured", "row_offsets", lambda t: t * 1000),
        ("unstructured", "mask", lambda t: t.fill_(255)),
        ("unstructured", "row_offsets", lambda t: t.clamp(max=20)),
        ("unstructured-int4", "mask", lambda t: t[:, :-1]),
        ("unstructured", "values", lambda t: t[:-8]),
    ],
)
def test_damaged_buffers_never_reach_a_kernel(format, buffer, change):
    packed = damage(pack(weight_for(parse_format(format), 6, 172), format), buffer, change)
    with pytest.raises(CTPError, match=buffer):
        packed.validate()


def test_a_group_larger_than_a_row_is_the_row():
    weight, x = torch.randn(8, 64), torch.randn(4, 64)
    expected = pack(weight, "int4-row")
    for size in (72, 2**30, 2**32, 2**32 + 8):
        packed = pack(weight, f"int4-g{size}")
        assert torch.equal(packed.unpack(), expected.unpack())
        assert torch.equal(PackedLinear(packed)(x), PackedLinear(expected)(x))


def test_zeros_beyond_the_codes_are_refused():
    codes, scales = torch.zeros(2, 64, dtype=torch.int32), torch.ones(2, 1)
    for values, zero in (("int8", 256), ("int4", 260), ("int4", -1)):
        with pytest.raises(CTPError, match=r"zeros outside \[0, "):
            pack_codes(codes, scales, torch.full((2, 1), zero), parse_format(f"{values}-row-asym"))


def test_a_packed_weight_names_its_values():
    packed = pack(torch.randn(4, 64), "sparse24")
    with pytest.raises(CTPError, match="names no kind of value"):
        replace(packed, format=parse_format("sparse24")).validate()


def test_missing_and_unknown_buffers_are_named():
    packed = pack(torch.randn(4, 64), "int4")
    packed.buffers["extra"] = packed.buffers.pop("scales")
    with pytest.raises(CTPError, match=r"scales.*extra"):
        packed.validate()


def test_tile_offsets_count_the_entries_before_each_tile():
    weight = torch.randn(5, 300) * (torch.rand(5, 300) < 0.4)
    packed = pack(weight, "unstructured-int4")
    found = dict(zip(packed.format.kernel_names, packed.tensors, strict=True))["tile_offsets"]
    assert found.tolist() == [[int((weight[n, : 128 * t] != 0).sum()) for n in range(5)] for t in range(3)]
