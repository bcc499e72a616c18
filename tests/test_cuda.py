"""The CUDA kernels: their own source on the emulator against the unpacked weight, and on a GPU where there is one."""

from __future__ import annotations

import re

import pytest
import torch

from ctp_kernels import CTPError, backends, pack, parse_format
from ctp_kernels.backends import c_interface, cuda

from . import emulated
from .emulated import DTYPES, FORMATS, SHAPES, assert_right, assert_right_t, backward, forward, problem

HALVES = ["fp16", "bf16"]


@pytest.fixture(scope="module")
def library():
    return emulated.load()


@pytest.fixture(autouse=True)
def counters_are_zero_after_every_call(request):
    yield
    if "library" in request.fixturenames:
        assert not emulated.workspace()[0].any()


def supported(name: str, shape: tuple[int, int], dtype: torch.dtype, direction: str) -> bool:
    return cuda.no_kernel(parse_format(name).with_dtype(dtype), shape, dtype, direction) is None


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_forward_against_the_unpacked_weight(library, name, shape, dtype):
    (n, k), m = SHAPES[shape]
    packed, x, bias = problem(name, (n, k), m, DTYPES[dtype])
    assert supported(name, (n, k), x.dtype, "forward")
    assert_right(forward(x, packed, bias), x, packed, bias)
    assert_right(forward(x, packed, shared=False), x, packed)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_backward_against_the_unpacked_weight(library, name, shape, dtype):
    (n, k), m = SHAPES[shape]
    packed, dy, _ = problem(name, (n, k), m, DTYPES[dtype], "backward")
    assert supported(name, (n, k), dy.dtype, "backward")
    assert_right_t(backward(dy, packed), dy, packed)
    assert_right_t(backward(dy, packed, shared=False), dy, packed)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [3, 12, 150], ids=["narrow", "two_eights", "wide"])
@pytest.mark.parametrize("name", FORMATS)
def test_one_hot_rows_return_the_decoded_weight_bit_for_bit(library, name, rows, dtype):
    n, k = 22, 128
    packed, _, _ = problem(name, (n, k), 1, DTYPES[dtype])
    decoded = packed.unpack(DTYPES[dtype])
    for first in range(0, k, rows):
        one_hot = torch.eye(k, dtype=DTYPES[dtype])[first : first + rows]
        assert torch.equal(forward(one_hot, packed).T, decoded[:, first : first + rows])
    for first in range(0, n, rows):
        one_hot = torch.eye(n, dtype=DTYPES[dtype])[first : first + rows]
        assert torch.equal(backward(one_hot, packed), decoded[first : first + rows])


@pytest.mark.parametrize("name", ["int4", "int3-asym", "sparse24-int4", "sparse24-bf16", "unstructured-int4"])
def test_the_order_of_warps_and_blocks_changes_no_bit(library, name):
    packed, x, bias = problem(name, (520, 2048), 20, torch.bfloat16)
    dy = torch.randn(20, 520).bfloat16()
    forwards, backwards = forward(x, packed, bias), backward(dy, packed)
    library.ctp_emulator_configure(0, 1, 4)
    try:
        assert torch.equal(forward(x, packed, bias), forwards)
        assert torch.equal(backward(dy, packed), backwards)
    finally:
        library.ctp_emulator_configure(0, 0, 4)


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("name", ["int4", "sparse24", "unstructured"])
def test_any_number_of_blocks_may_share_a_sum(library, name, multiprocessors):
    library.ctp_emulator_configure(0, 0, multiprocessors)
    try:
        packed, x, _ = problem(name, (70, 1920), 20, torch.float16)
        assert_right(forward(x, packed), x, packed)
        packed, dy, _ = problem(name, (1984, 128), 2, torch.float16, "backward")
        assert_right_t(backward(dy, packed), dy, packed)
    finally:
        library.ctp_emulator_configure(0, 0, 4)


def test_a_small_workspace_means_fewer_blocks(library):
    packed, x, _ = problem("int4", (64, 2048), 20, torch.float16)
    counters, floats = emulated.workspace()
    small = counters, torch.full((64 * 32 * 2 + 64,), torch.nan)[: 64 * 32 * 2]  # two blocks' parts
    y = cuda.launch(library, x, packed.tensors, packed.format, 64, None, 0, small)
    assert_right(y, x, packed)
    assert small[1].isfinite().all() and floats.numel() > small[1].numel()


@pytest.mark.parametrize("name", ["int4", "sparse24", "sparse24-int3", "unstructured-int4"])
@pytest.mark.parametrize("view", ["padded_rows", "transposed", "misaligned", "expanded", "empty", "one_row"])
def test_strided_activations(library, view, name):
    n, k = 16, 256
    packed, _, _ = problem(name, (n, k), 1, torch.float16)
    for width, run, check in ((k, forward, assert_right), (n, backward, assert_right_t)):
        base = torch.randn(6, 2 * width + 1, dtype=torch.float16)
        x = {
            "padded_rows": base[:, :width],
            "transposed": base[:, :width].T.contiguous().T,
            "misaligned": base.view(-1)[1 : 1 + 3 * width].view(3, width),
            "expanded": base[:1, :width].expand(3, width),
            "empty": base[:0, :width],
            "one_row": base[:1, :width],  # of which nobody asks where the next would begin
        }[view]
        y = run(x, packed)
        assert y.shape == (x.shape[0], n + k - width)
        check(y, x, packed)


@pytest.mark.parametrize("name", ["int4", "sparse24", "unstructured"])
def test_padding_beside_the_activations_is_never_multiplied(library, name):
    packed, _, _ = problem(name, (12, 256), 1, torch.bfloat16)
    x = torch.full((9, 264), torch.nan, dtype=torch.bfloat16)
    x[:, :256] = torch.randn(9, 256)
    assert_right(forward(x[:, :256], packed), x[:, :256], packed)
    dy = torch.full((9, 16), torch.nan, dtype=torch.bfloat16)
    dy[:, :12] = torch.randn(9, 12)
    assert_right_t(backward(dy[:, :12], packed), dy[:, :12], packed)


@pytest.mark.parametrize("name,lost", [("int4", False), ("unstructured", False), ("sparse24", True)])
def test_a_nan_reaches_every_output_but_past_pruned_entries_of_the_sparse_cores(library, name, lost):
    packed, x, _ = problem(name, (16, 128), 2, torch.float16)
    x[1, 5] = torch.nan
    y = forward(x, packed)
    assert y[0].isfinite().all()
    reached = packed.mask()[:, 5] if lost else torch.ones(16, dtype=torch.bool)
    assert torch.equal(y[1].isnan(), reached)


@pytest.mark.parametrize("name", ["int4-asym", "int3", "int8", "sparse24-int4", "unstructured-int4"])
def test_fp32_scales(library, name):
    torch.manual_seed(0)
    weight = torch.randn(20, 256) * 1e-6
    packed = pack(weight * (torch.rand(20, 256) > 0.5) if "unstructured" in name else weight, name)
    assert packed.buffers["scales"].dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        x, dy = torch.randn(3, 256).to(dtype), torch.randn(3, 20).to(dtype)
        exact = x.double() @ packed.unpack(torch.float64).T
        tiny = 2**-24 if dtype == torch.float16 else 0  # fp16's smallest number
        assert ((forward(x, packed).double() - exact).abs() <= 2**-8 * exact.abs() + 1e-9 + tiny).all()
        exact = dy.double() @ packed.unpack(dtype).double()
        assert ((backward(dy, packed).double() - exact).abs() <= 2**-8 * exact.abs() + 1e-9 + tiny).all()


def test_an_all_zero_unstructured_weight_gives_zeros(library):
    packed = pack(torch.zeros(10, 256), "unstructured-bf16")
    assert packed.buffers["values"].numel() == 0
    assert not forward(torch.randn(3, 256).bfloat16(), packed).any()
    assert not backward(torch.randn(3, 10).bfloat16(), packed).any()


def test_nothing_is_read_beyond_the_buffers(library):
    done = emulated.in_a_process("guarded")
    assert done.returncode == 0 and done.stdout.split() == list(FORMATS), done.stdout + done.stderr


def test_bad_arguments_are_a_status_not_a_crash(library):
    packed, x, _ = problem("int4", (4, 128), 2, torch.float16)
    codes, scales = packed.tensors
    y = torch.empty(2, 128, dtype=torch.float16)
    good = dict(n=4, k=128, pattern=0, values=4, scale_dtype=1, symmetric=1, group=128, stored=codes.data_ptr())
    good["scales"] = scales.data_ptr()

    def status(transposed=False, **changes):
        call = {"x": x.data_ptr(), "ldx": 128, "m": 2, "dtype": 1} | changes
        weight = c_interface.Weight(**{name: changes.get(name, value) for name, value in good.items()})
        weight.mask, weight.stored_hi = changes.get("mask"), changes.get("stored_hi")
        arguments = (call["x"], call["ldx"], call["m"], *(() if transposed else (None,)), y.data_ptr(), call["dtype"])
        run = library.ctp_cuda_matmul_t if transposed else library.ctp_cuda_matmul
        return run(weight, *arguments, None, None, 0, None)

    assert status() == 0 and status(transposed=True) == 0
    for bad in (
        *({"pattern": 3}, {"pattern": 1}, {"values": 5}, {"values": 1}, {"n": 0}, {"k": 0}, {"k": 100}, {"k": 2**31}),
        *({"group": 12}, {"scale_dtype": 2}, {"symmetric": 0}, {"stored": None}, {"scales": None}),
        *({"stored": codes.data_ptr() + 2}, {"m": -1}, {"dtype": 0}, {"dtype": 3}, {"x": None}),
        *({"ldx": 129}, {"ldx": 2**27}),
        *({"mask": codes.data_ptr()}, {"stored_hi": codes.data_ptr()}),
    ):
        assert status(**bad) == 1 and status(transposed=True, **bad) == 1, bad
    assert "misaligned" in cuda._sentence(library, 1)


@pytest.mark.parametrize("name", ["int4", "int3-asym", "sparse24-int4", "unstructured"])
def test_a_bound_weight_gives_the_same_bits_and_leaves_what_it_cannot_do(library, monkeypatch, name):
    monkeypatch.setattr(cuda, "_library", lambda: library)
    monkeypatch.setattr(cuda, "_current_device", lambda: 0)
    monkeypatch.setattr(cuda, "_current_stream", lambda index: 0)
    monkeypatch.setattr(cuda, "_workspace", lambda *_: emulated.workspace())
    left: list[int] = []
    monkeypatch.setattr(cuda, "matmul", lambda x, *rest: left.append(len(x)) or forward(x, packed, rest[-1]))
    packed, x, bias = problem(name, (40, 256), 20, torch.bfloat16)
    run = cuda.bind(packed.tensors, packed.format, 40, 256)
    for m in (1, 3, 16, 20):
        assert torch.equal(run(x[:m], bias), forward(x[:m], packed, bias)) and not left
        assert torch.equal(run(x[:m][None], None)[0], forward(x[:m], packed)) and not left
    for other in (x[:0], x.T.contiguous().T[:3], torch.cat([x[0, :1], x[:2].flatten()])[1:].view(2, 256)):
        assert torch.equal(run(other, bias), forward(other, packed, bias))
    assert left == [0, 3, 2]
    moved = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in packed.tensors]
    assert torch.equal(cuda.bind(moved, packed.format, 40, 256)(x[:1], None), forward(x[:1], packed)) and left[3:] == [
        1
    ]


def test_inputs_that_are_no_whole_tiles_are_refused():
    reason = cuda.no_kernel(parse_format("int4"), (8, 100), torch.float16, "forward")
    assert reason == "100 inputs are not a multiple of 128, or more than 2^20"
    assert cuda.no_kernel(parse_format("int4"), (8, 2**20 + 128), torch.float16, "forward") is not None


@pytest.mark.parametrize("capability,runs", [((8, 9), True), ((9, 0), True), ((7, 5), False), ((10, 0), False)])
def test_a_gpu_without_code_in_the_library_is_refused(monkeypatch, library, capability, runs):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(cuda, "_library", lambda: library)
    reason = cuda.unsupported(parse_format("int4"), (8, 128), torch.float16, torch.device("cuda"), "forward")
    assert (reason is None) == runs and (runs or "compute capability" in str(reason))


@pytest.mark.parametrize("rows,expected", [(1, "cuda"), (64, "cuda"), (128, "triton")])
def test_auto_takes_another_backend_where_it_is_faster(monkeypatch, rows, expected):
    format = parse_format("int4")
    monkeypatch.setattr(cuda, "unsupported", lambda *arguments: None)  # as on a machine with a GPU
    monkeypatch.setattr(backends, "BACKENDS", ("cuda", "triton", "reference"))
    backends.choose.cache_clear()
    try:
        chosen = backends.choose(format, (256, 256), torch.float16, "cuda", "forward", rows=rows)
        backward = backends.choose(format, (256, 256), torch.float16, "cuda", "backward", rows=rows)
    finally:
        backends.choose.cache_clear()
    assert (chosen.backend, backward.backend) == (expected, "triton")


@pytest.mark.parametrize(
    "name,dtype,device,direction,reason",
    [
        ("int4", torch.float16, "cpu", "forward", "tensors are on cpu"),
        ("int4", torch.float64, "cuda", "forward", "activations are float64"),
        ("int4", torch.float32, "cuda", "forward", "activations are float32"),
        ("bf16", torch.bfloat16, "cuda", "forward", "no CUDA kernel for bf16"),
        ("sparse24-int8", torch.bfloat16, "cuda", "forward", "no CUDA kernel for sparse24-int8"),
        ("unstructured-int3", torch.float16, "cuda", "backward", "no CUDA kernel for unstructured-int3"),
        ("sparse24-fp16", torch.bfloat16, "cuda", "forward", "fp16 values are not multiplied with bf16"),
        ("int3-g24", torch.float16, "cuda", "forward", "groups of 24 inputs are not a multiple of 32"),
        ("sparse24-int4-g64", torch.float16, "cuda", "forward", "groups of 64 inputs are not a multiple of 128"),
        ("int4-g8", torch.float16, "cuda", "backward", "groups of 8 inputs are not a multiple of 16"),
    ],
)
def test_what_it_cannot_do_it_says(name, dtype, device, direction, reason):
    assert reason in str(cuda.unsupported(parse_format(name), (8, 256), dtype, torch.device(device), direction))


def test_int8_activations_are_refused():
    format = parse_format("int4")
    assert "int8 activations" in str(
        cuda.unsupported(format, (8, 128), torch.float16, torch.device("cuda"), "forward", "int8")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_last_reason_is_that_there_is_none():
    for name in FORMATS:
        format = parse_format(name).with_dtype(torch.bfloat16)
        for direction in ("forward", "backward"):
            reason = cuda.unsupported(format, (8, 256), torch.bfloat16, torch.device("cuda"), direction)
            assert reason == "PyTorch finds no GPU"


def test_a_workspace_belongs_to_a_stream_and_a_captured_graph_gets_its_own(library, monkeypatch):
    monkeypatch.setattr(cuda, "_workspaces", {})
    monkeypatch.setattr(cuda, "_WORKSPACE_BYTES", 64)
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    device = torch.device("cpu")
    first = cuda._workspace(library, device, 1)
    assert cuda._workspace(library, device, 1) is first
    assert cuda._workspace(library, device, 2) is not first
    capturing[0] = True
    assert cuda._workspace(library, device, 1) is not first
    assert first[0].numel() == library.ctp_cuda_counters() and not first[0].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [*SHAPES, "layer"])
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu_against_the_unpacked_weight(name, shape, dtype):
    (n, k), m = ((4096, 4096), 16) if shape == "layer" else SHAPES[shape]
    packed, x, bias = problem(name, (n, k), m, DTYPES[dtype])
    _, dy, _ = problem(name, (n, k), m, DTYPES[dtype], "backward")
    packed, x, bias, dy = packed.to("cuda"), x.cuda(), bias.cuda(), dy.cuda()
    assert cuda.unsupported(packed.format, (n, k), x.dtype, x.device, "forward") is None
    y, dx = cuda.matmul(x, packed.tensors, packed.format, n, bias), cuda.matmul_t(dy, packed.tensors, packed.format, k)
    assert_right(y, x, packed, bias)
    assert_right_t(dx, dy, packed)
    for _ in range(100):
        assert torch.equal(cuda.matmul(x, packed.tensors, packed.format, n, bias), y)
        assert torch.equal(cuda.matmul_t(dy, packed.tensors, packed.format, k), dx)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_gives_the_same_bits():
    packed, x, _ = problem("int4", (4096, 4096), 40, torch.float16)
    packed, x = packed.to("cuda"), x.cuda()

    def run():
        y = [cuda.matmul(x[:m], packed.tensors, packed.format, 4096, None) for m in (4, 40)]
        return torch.cat([*y, cuda.matmul_t(x, packed.tensors, packed.format, 4096)])

    eager = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, eager)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_failed_launch_is_said_in_the_drivers_words():
    from . import test_cuda_build

    compiled = test_cuda_build.compiled_library()
    assert re.match(r"no usable GPU: .*(driver|device)", str(cuda.no_device(compiled)))
    packed, x, bias = problem("int4", (4, 128), 2, torch.float16)
    with pytest.raises(CTPError, match=r"CUDA kernel for int4 failed: .*(driver|device)"):
        cuda.launch(compiled, x, packed.tensors, packed.format, 4, bias, 0)
    with pytest.raises(CTPError, match=r"dX of int4 failed: .*(driver|device)"):
        cuda.launch_t(compiled, x[:, :4].contiguous(), packed.tensors, packed.format, 128, 0)
