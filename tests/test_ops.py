"""The operators and PackedLinear: against the unpacked weight, under autograd, opcheck and torch.compile."""

import copy
import io

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from ctp_kernels import CTPError, PackedLinear, pack, parse_format
from tests.helpers import FORMAT_NAMES, weight_for

SOME = ["int4", "int3-g64-asym", "sparse24", "unstructured", "sparse24-int3", "unstructured-int4"]


def layer_for(name: str, n: int = 24, k: int = 172, backend: str = "auto", bias: bool = True) -> PackedLinear:
    format = parse_format(name)
    torch.manual_seed(1)
    return PackedLinear(pack(weight_for(format, n, k), format), torch.randn(n) if bias else None, backend)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_reference_is_the_unpacked_linear(name):
    layer = layer_for(name, backend="reference")
    dense = layer.packed.unpack().double()
    x = torch.randn(2, 3, 172, dtype=torch.double, requires_grad=True)
    y = layer.double()(x)
    expected = torch.nn.functional.linear(x, dense, layer.bias)
    assert torch.allclose(y, expected, rtol=1e-12)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.allclose(dx, dy @ dense, rtol=1e-12)


@pytest.mark.parametrize("name", SOME)
def test_gradcheck_in_fp64(name):
    layer = layer_for(name, n=5, k=20, backend="reference").double()
    x = torch.randn(3, 20, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", SOME)
def test_opcheck(name, backend):
    packed = layer_for(name).packed
    x = torch.randn(3, 172, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    for compute in ("exact", "int8") if packed.format.quantized else ("exact",):
        torch.library.opcheck(torch.ops.ctp.matmul, (x, packed.tensors, bias, name_of(packed), 24, backend, compute))
    dy = torch.randn(3, 24, requires_grad=True)
    torch.library.opcheck(torch.ops.ctp.matmul_t, (dy, packed.tensors, name_of(packed), 172, backend))


def name_of(packed):
    return packed.format.name


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_compile_without_a_graph_break_forward_and_backward(backend):
    layer = layer_for("unstructured-int4", backend=backend)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 172, requires_grad=True)
    y = compiled(x)
    assert torch.allclose(y, layer(x), atol=1e-5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(dx, expected, atol=1e-5)


def test_the_kernel_is_called_directly_where_nobody_listens_and_only_there(monkeypatch):
    layer, x = layer_for("int4", n=24, k=172), torch.randn(2, 3, 172)
    expected = layer(x)
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer(x)
    assert "ctp::matmul" in {event.key for event in profile.key_averages()}

    def counted(layer, x):
        with FlopCounterMode(display=False):
            layer(x)

    def operator(*_):
        raise LookupError("the operator was called")

    monkeypatch.setattr(torch.ops.ctp, "matmul", operator)
    for silent in (torch.no_grad, torch.inference_mode):
        with silent():
            assert torch.equal(layer(x), expected)
    listeners = {
        "gradients": lambda: layer(x),
        "a mode": lambda: counted(layer, x),
        "vmap": lambda: torch.vmap(layer)(x),
        "make_fx": lambda: make_fx(layer)(x),
    }
    for name, call in listeners.items():
        with torch.set_grad_enabled(name == "gradients"), pytest.raises(LookupError):
            call()


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_a_bound_layer_sees_every_change_of_its_weight_and_settings(name):
    layer, other = layer_for(name), layer_for(name, bias=False)
    x = torch.randn(3, 172)

    def fresh():  # the operator, which keeps nothing
        packed = layer.packed
        return torch.ops.ctp.matmul(x, packed.tensors, layer.bias, layer.format.name, 24, layer.backend, layer.compute)

    def check():
        assert torch.equal(layer(x), fresh()) and torch.equal(layer(x[None])[0], fresh())

    check()
    assert torch.equal(layer(x.t().contiguous().t()), fresh())  # strided x
    # another weight in the same memory, then the same tensors on other memory
    for buffer in ("values", "codes", "scales"):
        if buffer in layer.format.buffer_names:
            getattr(layer, buffer).copy_(getattr(layer, buffer).flip(0))
    check()
    for tensor in layer.buffers():
        tensor.data = tensor.clone()
    check()
    layer.bias = None
    check()
    layer.load_state_dict(other.state_dict())
    check()
    layer.backend = "reference"
    check()
    layer.backend = "cpu"
    if layer.format.quantized:
        layer.compute = "int8"
        check()
        layer.compute = "exact"
    x = x.bfloat16()
    check()
    layer.to(torch.bfloat16)
    check()


@torch.no_grad()
def test_a_bound_layer_is_copied_and_saved_without_what_it_is_bound_to():
    layer, x = layer_for("int4"), torch.randn(3, 172)
    expected = layer(x)
    copied = copy.deepcopy(layer)
    layer.codes.zero_()
    assert torch.equal(copied(x), expected) and not torch.equal(layer(x), expected)
    saved = io.BytesIO()
    torch.save(copied, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(x), expected)


@torch.no_grad()
def test_a_bound_layer_runs_another_backend_where_its_own_is_slower(monkeypatch):
    from ctp_kernels.backends import choose, cpu, reference, triton

    seen: list[int] = []
    monkeypatch.setattr(cpu, "slower", lambda format, rows, direction: "many" if rows > 2 else None, raising=False)
    monkeypatch.setattr(triton, "unsupported", lambda *arguments: None)
    monkeypatch.setattr(triton, "matmul", lambda x, *rest: seen.append(len(x)) or reference.matmul(x, *rest))
    choose.cache_clear()
    try:
        layer = layer_for("int4")
        for rows in (1, 2, 5, 2):
            layer(torch.randn(rows, 172))
    finally:
        choose.cache_clear()
    assert seen == [5]


def test_a_weight_on_another_device_is_refused():
    layer = layer_for("int4")
    x = torch.randn(3, 172)
    with torch.no_grad():
        layer(x)
        layer.scales = layer.scales.to("meta")
        with pytest.raises(CTPError, match="activations are on cpu, but 'scales' of the int4 weight is on meta"):
            layer(x)


def test_backward_keeps_only_the_packed_buffers():
    layer = layer_for("int4")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(64, 172, requires_grad=True)).sum()
    own = {tensor.data_ptr() for tensor in layer.packed.tensors}
    assert kept and all(tensor.data_ptr() in own for tensor in kept)


def test_bias_gets_a_gradient_when_asked():
    layer = layer_for("int4")
    layer.bias.requires_grad_(True)
    layer(torch.randn(7, 172)).sum().backward()
    assert torch.allclose(layer.bias.grad, torch.full((24,), 7.0))


def test_casting_moves_what_linear_would_move_and_no_code():
    for name in ("int4-asym", "sparse24"):
        layer = layer_for(name)
        before = layer.packed
        half = copy.deepcopy(layer).to(torch.bfloat16)
        assert half.bias.dtype == torch.bfloat16 and half.dtype == torch.bfloat16
        x = torch.randn(3, 172).bfloat16()
        assert half(x).dtype == torch.bfloat16
        for buffer, tensor in half.packed.buffers.items():
            old = before.buffers[buffer]
            expected = old.bfloat16() if buffer == "values" else old
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
        half.packed.validate()
    assert half.format.name == "sparse24-bf16"


def test_double_is_exact():
    layer = layer_for("sparse24", backend="reference")
    wide = copy.deepcopy(layer).double()
    assert torch.equal(wide.packed.unpack(torch.float32), layer.packed.unpack())
    assert wide(torch.randn(2, 172).double()).dtype == torch.double


def test_state_dict_round_trip_through_torch_save():
    layer = layer_for("unstructured-int3")
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = PackedLinear(pack(torch.zeros(24, 172), "unstructured-int3"), torch.zeros(24))
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 172)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.tile_offsets, layer.tile_offsets)


def test_damaged_state_is_refused_and_the_layer_stays_sound():
    layer = layer_for("unstructured-int3")
    state = layer.state_dict()
    state["row_offsets"] = state["row_offsets"] * 3
    other = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="row_offsets"):
        other.load_state_dict(state)
    assert torch.equal(other(torch.ones(1, 172)), layer(torch.ones(1, 172)))


@pytest.mark.parametrize("keys,value", [(("codes", "codes_hi", "mask", "row_offsets"), -(2**28)), (("mask",), 255)])
def test_a_part_of_a_state_is_checked_beside_the_rest(keys, value):
    layer = layer_for("unstructured-int3")
    before = copy.deepcopy(layer)
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items() if key in keys}
    state[keys[-1]][:-1] = value
    with pytest.raises(RuntimeError, match=keys[-1]):
        layer.load_state_dict(state, strict=False)
    for m in (1, 40):
        assert torch.equal(layer(torch.ones(m, 172)), before(torch.ones(m, 172)))


def test_scales_keep_their_precision_when_loaded():
    """Scales below 2^-14 are stored in fp32, and a layer whose own are fp16 takes them as they are."""
    small, layer = PackedLinear(pack(torch.randn(8, 64) * 1e-4, "int8")), PackedLinear(pack(torch.randn(8, 64), "int8"))
    assert (small.scales.dtype, layer.scales.dtype) == (torch.float32, torch.float16)
    layer.load_state_dict(small.state_dict())
    assert torch.equal(layer.packed.unpack(), small.packed.unpack())


@pytest.mark.parametrize("k,wrong", [(60, 64), (64, 60), (64, 128)])
def test_inputs_of_another_width_are_refused(k, wrong):
    with pytest.raises(CTPError, match=f"does not fit a layer of {k} inputs"):
        layer_for("int4", k=k)(torch.randn(2, wrong))


def test_deepcopy_shares_nothing():
    layer = layer_for("int4")
    other = copy.deepcopy(layer)
    other.scales.zero_()
    assert layer.scales.abs().sum() > 0


def test_an_impossible_request_raises_with_the_reason():
    layer = layer_for("int4", backend="triton")
    with pytest.raises(CTPError, match="triton"):
        layer(torch.randn(1, 172))
    with pytest.raises(CTPError, match="unknown backend"):
        layer_for("int4", backend="gpu")(torch.randn(1, 172))
