"""One layer in the layouts of GPTQ and compressed-tensors: bits against plain integers, there and back."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctp_kernels import CTPError, PackedLinear, pack, pack_codes, parse_format, unpatch_model
from ctp_kernels.checkpoints import compressed_tensors, gptq
from ctp_kernels.checkpoints.layer import Layer, group_order
from ctp_kernels.checkpoints.words import codes_to_words, padded_to_codes, planar_to_codes, words_to_codes

CODES = ["int2-g32", "int3", "int3-g32-asym", "int4-g32", "int4-row-asym", "int8-row", "int8-g64-asym"]


def string_of_bits(row: list[int], bits: int) -> list[int]:
    """Codes one after the other in one great integer, cut into signed 32-bit words."""
    whole = sum(code << bits * j for j, code in enumerate(row))
    words = [whole >> 32 * i & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 100), st.randoms(use_true_random=False))
def test_words_are_one_string_of_bits(bits: int, rows: int, count: int, generator: random.Random) -> None:
    codes = [[generator.randrange(2**bits) for _ in range(count)] for _ in range(rows)]
    tensor = torch.tensor(codes, dtype=torch.uint8)
    words = codes_to_words(tensor, bits)
    assert words.tolist() == [string_of_bits(row, bits) for row in codes]
    assert torch.equal(words_to_codes(words, bits, count), tensor)


def test_padded_and_planar_int3() -> None:
    codes = torch.randint(0, 8, (3, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = codes.tolist()
    padded = [[string_of_bits(row[i : i + 10], 3)[0] for i in range(0, 64, 10)] for row in rows]
    assert torch.equal(padded_to_codes(torch.tensor(padded, dtype=torch.int32), 3, 64), codes)
    planar = [
        [
            word
            for i in range(0, 64, 32)
            for word in (
                *string_of_bits([c & 3 for c in row[i : i + 32]], 2),
                *string_of_bits([c >> 2 for c in row[i : i + 32]], 1),
            )
        ]
        for row in rows
    ]
    assert torch.equal(planar_to_codes(torch.tensor(planar, dtype=torch.int32), 64), codes)


def a_layer(name: str, n: int = 64, k: int = 256, ordered: bool = False) -> Layer:
    """`ordered`: every input belongs to a group drawn at random, as act-order leaves it."""
    generator = torch.Generator().manual_seed(1)
    weight = pack(torch.randn(n, k, generator=generator).half(), name)
    order = None
    if ordered:
        g_idx = torch.arange(k)[torch.randperm(k, generator=generator)] // (weight.format.group_size or k)
        order = torch.argsort(g_idx, stable=True).int()
    return Layer(weight, order)


def same(a: Layer, b: Layer) -> bool:
    tensors = zip(a.weight.tensors, b.weight.tensors, strict=True)
    orders = (a.order is None) == (b.order is None) and (a.order is None or torch.equal(a.order, b.order))
    return a.weight.format == b.weight.format and orders and all(torch.equal(x, y) for x, y in tensors)


def dense(layer: Layer) -> torch.Tensor:
    return PackedLinear(layer.weight, order=layer.order).weight


def by_hand(parts: dict[str, torch.Tensor], bits: int, offset: int) -> torch.Tensor:
    """A GPTQ layer (N, K) decoded number by number, as its layout is described."""
    k, n = parts["g_idx"].numel(), parts["scales"].shape[1]

    def codes(words: list[int], count: int) -> list[int]:
        whole = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
        return [whole >> bits * j & (2**bits - 1) for j in range(count)]

    columns = torch.tensor([codes(column, k) for column in parts["qweight"].T.tolist()])
    zeros = torch.tensor([codes(row, n) for row in parts["qzeros"].tolist()]) + offset
    group = parts["g_idx"].long()
    return parts["scales"].float().T[:, group] * (columns - zeros.T[:, group])


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("name", CODES)
def test_gptq_layers(name: str, layout: str, ordered: bool) -> None:
    layer = a_layer(name, ordered=ordered and "row" not in name)
    parts = gptq.write_layer(layer, layout)
    expected = by_hand(parts, layer.weight.format.bits, 1 if layout == "gptq" else 0)
    assert torch.equal(expected.half(), dense(layer))
    config = {"checkpoint_format": layout, "group_size": layer.weight.format.group_size or -1}
    assert same(gptq.read_layer(parts, layer.weight.shape, config, torch.float16), layer)


def test_a_zero_of_0_is_written_as_gptq_v2_and_read_from_both() -> None:
    layer = a_layer("int4-g32-asym")
    assert gptq.layout_for([a_layer("int4-g32")]) == "gptq"
    assert gptq.layout_for([a_layer("int4-g32"), layer]) == "gptq_v2"
    layer.weight.buffers["zeros"][3, 2] = 0
    with pytest.raises(CTPError, match="gptq_v2"):
        gptq.write_layer(layer, "gptq")
    wide = a_layer("int4-g32")
    wide.weight.buffers["scales"] = torch.full((64, 8), 1e-9)
    with pytest.raises(CTPError, match="fp16 cannot hold"):
        gptq.write_layer(wide, "gptq")
    parts = gptq.write_layer(layer, "gptq_v2")
    assert same(gptq.read_layer(parts, (64, 256), {"format": "gptq_v2"}, torch.float16), layer)
    borrowed = parts | {"qzeros": parts["qzeros"] - 0x11111111}  # as GPTQModel writes it: of whole words
    assert same(gptq.read_layer(borrowed, (64, 256), {}, torch.float16), layer)
    layer = a_layer("int3-g32-asym")
    layer.weight.buffers["zeros"][3, 2] = 0
    parts = gptq.write_layer(layer, "gptq_v2")
    parts["qzeros"] = codes_to_words((words_to_codes(parts["qzeros"], 3, 64) - 1) & 7, 3)  # but 3 bits, of fields
    assert same(gptq.read_layer(parts, (64, 256), {}, torch.float16), layer)


def test_planar_gptq() -> None:
    layer = a_layer("int3-g32-asym")
    parts = gptq.write_layer(layer, "gptq_v2")
    for name in ("qweight", "qzeros"):
        codes = words_to_codes(parts[name].T if name == "qweight" else parts[name], 3, 256 if name == "qweight" else 64)
        low = codes_to_words(codes & 3, 2).view(len(codes), -1, 2)
        high = codes_to_words(codes >> 2, 1).view(len(codes), -1, 1)
        planar = torch.cat([low, high], -1).view(len(codes), -1)
        parts[name] = planar.T if name == "qweight" else planar
    assert same(gptq.read_layer(parts, (64, 256), {"checkpoint_format": "gptq_p"}, torch.float16), layer)
    odd = gptq.write_layer(a_layer("int3-row", k=172), "gptq_v2")
    with pytest.raises(CTPError, match="multiples of 32"):
        gptq.read_layer(odd, (64, 172), {"checkpoint_format": "gptq_p"}, torch.float16)


def config_for(name: str) -> dict:
    return compressed_tensors.quantization_config(parse_format(name), ["lm_head"])


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", CODES)
def test_compressed_tensors_layers(name: str, ordered: bool) -> None:
    layer = a_layer(name, ordered=ordered and "row" not in name)
    format = layer.weight.format
    parts = compressed_tensors.write_layer(Layer(layer.weight), format.symmetric)
    if layer.order is not None:  # of versions before 0.20, which nothing writes any more
        back = torch.argsort(layer.order)
        columns = words_to_codes(parts["weight_packed"], format.bits, 256)[:, back]
        parts |= {"weight_packed": codes_to_words(columns, format.bits),
                  "weight_g_idx": torch.arange(256)[back] // (format.group_size or 256)}  # fmt: skip
        with pytest.raises(CTPError, match="write gptq"):
            compressed_tensors.write_layer(layer, format.symmetric)
    signed = words_to_codes(parts["weight_packed"], format.bits, 256).float() - 2 ** (format.bits - 1)
    if "weight_zero_point" in parts:
        zeros = words_to_codes(parts["weight_zero_point"].T.contiguous(), format.bits, 64).T.float()
    else:
        zeros = torch.full(parts["weight_scale"].shape, 2 ** (format.bits - 1))
    group = parts.get("weight_g_idx", torch.arange(256) // (format.group_size or 256)).long()
    weight = parts["weight_scale"].float()[:, group] * (signed - (zeros - 2 ** (format.bits - 1))[:, group])
    assert torch.equal(weight.half(), dense(layer))
    config = config_for(name)
    assert same(compressed_tensors.read_layer(parts, (64, 256), config, torch.float16), layer)


def test_sizes_that_do_not_tell_padded_codes_apart() -> None:
    layer = a_layer("int3-row", k=140)
    parts = compressed_tensors.write_layer(layer, True)
    config = config_for("int3-row")
    assert same(compressed_tensors.read_layer(parts, (64, 140), config | {"version": "0.20.1"}, torch.float16), layer)
    codes = layer.weight.codes().int().view(64, 14, 10)
    parts["weight_packed"] = (codes << torch.arange(0, 30, 3)).sum(-1, dtype=torch.int32)
    assert same(compressed_tensors.read_layer(parts, (64, 140), config | {"version": "0.9.4"}, torch.float16), layer)
    for version in (None, "0.15.0"):
        with pytest.raises(CTPError, match="padded or not"):
            compressed_tensors.read_layer(parts, (64, 140), config | {"version": version}, torch.float16)


def test_older_compressed_tensors() -> None:
    layer = a_layer("int3-g32-asym")
    parts = compressed_tensors.write_layer(layer, False)
    codes = torch.nn.functional.pad(layer.weight.codes().int(), (0, 4)).view(64, 26, 10)
    parts["weight_packed"] = (codes << torch.arange(0, 30, 3)).sum(-1, dtype=torch.int32)
    parts["weight_zero_point"] = (layer.weight.buffers["zeros"].int() - 4).to(torch.int8)
    assert same(compressed_tensors.read_layer(parts, (64, 256), config_for("int3-g32-asym"), torch.float16), layer)
    del parts["weight_zero_point"]
    parts["weight_scale"] = torch.tensor([0.5])
    read = compressed_tensors.read_layer(parts, (64, 256), config_for("int3-row"), torch.float16).weight
    assert read.format.name == "int3-row" and torch.equal(read.unpack(), (layer.weight.codes().half() - 4) * 0.5)


@pytest.mark.parametrize("name", ["sparse24", "unstructured"])
def test_bitmaps(name: str) -> None:
    values = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = pack(values * (torch.rand(16, 64) > 0.5), name)
    mask, kept = packed.mask(), packed.unpack()
    parts = {"compressed": kept[mask].view(16, -1) if name == "sparse24" else kept[mask],
             "bitmask": packed.buffers["mask"], "shape": torch.tensor([16, 64])}  # fmt: skip
    read = compressed_tensors.read_layer(parts, (16, 64), {}, torch.float16)
    assert same(read, Layer(packed))
    with pytest.raises(CTPError, match="entries"):
        compressed_tensors.read_layer(parts | {"compressed": parts["compressed"][:-1]}, (16, 64), {}, torch.float16)


def test_an_order_of_inputs_is_followed_forward_and_backward() -> None:
    layer = a_layer("int4-g32", ordered=True)
    packed = PackedLinear(layer.weight, order=layer.order)
    assert layer.order is not None
    columns = torch.empty(64, 256).half()
    columns[:, layer.order.long()] = layer.weight.unpack()
    assert torch.equal(packed.weight, columns)
    assert torch.equal(unpatch_model(torch.nn.Sequential(packed))[0].weight, columns)
    x = torch.randn(3, 5, 256, dtype=torch.float64, requires_grad=True)
    y = packed(x)
    wide = layer.weight.unpack(torch.float64)[:, torch.argsort(layer.order)]
    assert torch.allclose(y, x @ wide.T)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(grad, wide.sum(0).expand_as(x))
    assert torch.autograd.gradcheck(packed, torch.randn(2, 256, dtype=torch.float64, requires_grad=True))
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x.float()), packed(x.float()))


def test_what_the_tensors_leave_open_the_configuration_says() -> None:
    layer = a_layer("int4-g8", n=16, k=16)  # one word holds 8 codes of 4 bits, 16 of 2
    parts = gptq.write_layer(layer, "gptq")
    assert same(gptq.read_layer(parts, (16, 16), {"bits": 4}, torch.float16), layer)
    scales = torch.full((8, 2), 3e-5).half()  # below fp16's full precision, and still what the file holds
    layer = Layer(pack_codes(torch.zeros(8, 64, dtype=torch.uint8), scales, None, "int4-g32", dtype=torch.float16))
    assert same(gptq.read_layer(gptq.write_layer(layer, "gptq"), (8, 64), {}, torch.float16), layer)
    parts = compressed_tensors.write_layer(a_layer("int4-g96", k=192), True)
    config = config_for("int4-g96")
    config["config_groups"]["other"] = config_for("int4-g128")["config_groups"]["group_0"]
    with pytest.raises(CTPError, match="96 or 128"):
        compressed_tensors.read_layer(parts, (64, 192), config, torch.float16)


def test_groups_without_an_index() -> None:
    assert group_order(None, 256, 1, 128) == (None, None)
    assert group_order(None, 128, 1, 128) == (128, None)
    assert group_order(None, 172, 2, 128) == (128, None)
    assert group_order(None, 256, 4) == (64, None)
    with pytest.raises(CTPError, match="do not fit"):
        group_order(None, 172, 3, 128)
