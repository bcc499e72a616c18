"""The CPU kernels beside other libraries', in one interleaved run: pip install -e ".[bench,peers,ggml]" (ggml compiles
for minutes).

A peer that is not installed is skipped with its name. Each peer computes the same product from the same codes (or
zeros), and is checked against it before it is timed; those that quantise activations, or round them to bf16, or use a
grid of their own, within a wider tolerance.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.machine import cold_bytes
from ctp_kernels import PackedLinear, PackedWeight, pack, parse_format
from ctp_kernels.memory import in_huge_pages

N = K = 4096
ROWS = [1, 4, 16, 64, 512]
Call = Callable[[torch.Tensor], torch.Tensor]


@lru_cache(maxsize=1)
def case(format: str, zeros: float) -> tuple[list[PackedWeight], torch.Tensor]:
    """Copies of a packed weight that together exceed the caches, and the same weight dense in fp32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) * (torch.rand(N, K, generator=generator) >= zeros)
    packed = pack(weight, parse_format(format))
    copies = [
        PackedWeight(packed.format, packed.shape, torch.float32, {k: t.clone() for k, t in packed.buffers.items()})
        for _ in range(1 + cold_bytes() // packed.nbytes)
    ]
    in_huge_pages(copy.buffers for copy in copies)  # as patch_model does
    return copies, packed.unpack(torch.float32)


def onnxruntime(packed: PackedWeight, dense: torch.Tensor, accuracy_level: int) -> list[Call]:
    """MatMulNBits; accuracy level 1: fp32 activations, 4: int8."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    codes = packed.codes().reshape(N, K // 128, 64, 2).to(torch.uint8)
    planes = (codes[..., 0] | codes[..., 1] << 4).numpy()
    scales = packed.buffers["scales"].float().reshape(-1).numpy()
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=K, N=N, bits=4, block_size=128,
        accuracy_level=accuracy_level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "peer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", N])],
        [numpy_helper.from_array(planes, "codes"), numpy_helper.from_array(scales, "scales")],
    )  # fmt: skip
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)], ir_version=9
    )
    assert onnx.__version__
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or its pool would slow the others
    sessions = [ort.InferenceSession(model.SerializeToString(), options) for _ in range(8)]
    return [lambda x, s=s: torch.from_numpy(s.run(None, {"x": x.numpy()})[0]) for s in sessions]


def torch_int4(packed: PackedWeight, dense: torch.Tensor) -> list[Call]:
    """torch's weight-only int4, bf16 activations and scales."""
    codes = packed.codes().to(torch.int32)
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = packed.buffers["scales"].bfloat16().reshape(N, K // 128)
    grid = torch.stack([scales, torch.zeros_like(scales)], dim=2).transpose(0, 1).contiguous()
    run = torch.ops.aten._weight_int4pack_mm_for_cpu
    weights = [weight.clone() for _ in range(8)]
    return [lambda x, w=w: run(x.bfloat16(), w, 128, grid).float() for w in weights]


def bitsandbytes(packed: PackedWeight, dense: torch.Tensor) -> list[Call]:
    """Linear4bit, fp4, its own grid."""
    bnb = pytest.importorskip("bitsandbytes")
    layers = []
    for _ in range(8):
        layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(dense.clone(), requires_grad=False)
        layers.append(layer.to("cpu"))
    return [lambda x, layer=layer: layer(x) for layer in layers]


def torch_dynamic_int8(packed: PackedWeight, dense: torch.Tensor) -> list[Call]:
    layer = torch.nn.Linear(K, N, bias=False)
    layer.weight.data.copy_(dense)
    quantize = torch.ao.quantization.quantize_dynamic
    layers = [quantize(torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8) for _ in range(4)]
    return [lambda x, layer=layer: layer(x) for layer in layers]


def torch_csr(packed: PackedWeight, dense: torch.Tensor) -> list[Call]:
    weights = [dense.to_sparse_csr() for _ in range(2)]
    return [lambda x, w=w: (w @ x.T).T for w in weights]


def ggml(packed: PackedWeight, dense: torch.Tensor) -> list[Call]:
    """ggml's Q4_0 (blocks of 32, its own grid) in its repacked layout, activations in 8 bits, from llama-cpp-python's
    libraries; a call copies x in and y out."""
    lib = _ggml_libraries()
    weights = []
    for _ in range(4):
        context = lib.ggml_init(_GgmlParams(lib.ggml_tensor_overhead() * 2, None, True))
        weight = lib.ggml_new_tensor_2d(context, 2, K, N)
        size = lib.ggml_row_size(2, K) * N
        blocks = ctypes.create_string_buffer(size)
        lib.ggml_quantize_chunk(2, dense.contiguous().data_ptr(), blocks, 0, N, K, None)
        assert lib.ggml_backend_alloc_ctx_tensors_from_buft(context, lib.repacked)
        lib.ggml_backend_tensor_set(weight, blocks, 0, size)
        weights.append(weight)
    backend = lib.ggml_backend_cpu_init()
    lib.ggml_backend_cpu_set_n_threads(backend, torch.get_num_threads())

    @lru_cache
    def graph(weight: int, rows: int) -> tuple[int, int, int]:
        overhead = lib.ggml_tensor_overhead() * 4 + lib.ggml_graph_overhead()
        context = lib.ggml_init(_GgmlParams(overhead, None, True))
        x = lib.ggml_new_tensor_2d(context, 0, K, rows)
        y = lib.ggml_mul_mat(context, weight, x)
        steps = lib.ggml_new_graph(context)
        lib.ggml_build_forward_expand(steps, y)
        assert lib.ggml_backend_alloc_ctx_tensors(context, backend)
        return x, y, steps

    def run(weight: int, x: torch.Tensor) -> torch.Tensor:
        x_in, y_out, steps = graph(weight, len(x))
        y = torch.empty(len(x), N)
        lib.ggml_backend_tensor_set(x_in, x.data_ptr(), 0, x.nbytes)
        assert lib.ggml_backend_graph_compute(backend, steps) == 0
        lib.ggml_backend_tensor_get(y_out, y.data_ptr(), 0, y.nbytes)
        return y

    return [lambda x, w=w: run(w, x) for w in weights]


class _GgmlParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@lru_cache(maxsize=1)
def _ggml_libraries():
    """ggml's functions, and `repacked`: the buffer type that lays weights out for its fastest CPU kernels."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        pytest.skip("could not import 'llama_cpp': no ggml to compare with")
    folder = Path(found.submodule_search_locations[0]) / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"lib{n}.so"), mode=ctypes.RTLD_GLOBAL) for n in ("ggml-base", "ggml-cpu"))
    p, size, i32, i64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
    lib = SimpleNamespace()
    for library, name, returns, takes in (
        (base, "ggml_init", p, [_GgmlParams]),
        (base, "ggml_tensor_overhead", size, []),
        (base, "ggml_graph_overhead", size, []),
        (base, "ggml_row_size", size, [i32, i64]),
        (base, "ggml_new_tensor_2d", p, [p, i32, i64, i64]),
        (base, "ggml_quantize_chunk", size, [i32, p, p, i64, i64, i64, p]),
        (base, "ggml_mul_mat", p, [p, p, p]),
        (base, "ggml_new_graph", p, [p]),
        (base, "ggml_build_forward_expand", None, [p, p]),
        (base, "ggml_backend_alloc_ctx_tensors", p, [p, p]),
        (base, "ggml_backend_alloc_ctx_tensors_from_buft", p, [p, p]),
        (base, "ggml_backend_tensor_set", None, [p, p, size, size]),
        (base, "ggml_backend_tensor_get", None, [p, p, size, size]),
        (base, "ggml_backend_graph_compute", i32, [p, p]),
        (base, "ggml_backend_reg_get_proc_address", p, [p, ctypes.c_char_p]),
        (base, "ggml_backend_reg_dev_get", p, [p, size]),
        (base, "ggml_backend_buft_name", ctypes.c_char_p, [p]),
        (cpu, "ggml_backend_cpu_init", p, []),
        (cpu, "ggml_backend_cpu_set_n_threads", None, [p, i32]),
        (cpu, "ggml_backend_cpu_reg", p, []),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = returns, takes
        setattr(lib, name, function)
    registry = lib.ggml_backend_cpu_reg()
    address = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(p), p)(address)(lib.ggml_backend_reg_dev_get(registry, 0))
    kinds = list(itertools.takewhile(bool, (extra[i] for i in range(16))))
    lib.repacked = next(kind for kind in kinds if b"REPACK" in lib.ggml_backend_buft_name(kind))
    return lib


#: name -> (contender, format, zeros, relative error allowed[, compute: ours])
PEERS = {
    "onnxruntime exact": (lambda p, d: onnxruntime(p, d, 1), "int4", 0.0, 1e-4),
    "onnxruntime int8 activations": (lambda p, d: onnxruntime(p, d, 4), "int4", 0.0, 2e-2, "int8"),
    "ggml Q4_0": (ggml, "int4", 0.0, 0.2, "int8"),
    "torch int4": (torch_int4, "int4", 0.0, 1e-2),
    "torch dynamic int8": (torch_dynamic_int8, "int4", 0.0, 5e-2, "int8"),
    "bitsandbytes fp4": (bitsandbytes, "int4", 0.0, 0.3),
    "torch csr, 50 %": (torch_csr, "unstructured-bf16", 0.5, 1e-4),
    "torch csr, 75 %": (torch_csr, "unstructured-bf16", 0.75, 1e-4),
}


@lru_cache(maxsize=1)
def contender(peer: str) -> list[Call]:
    make, format, zeros, *_ = PEERS[peer]
    copies, dense = case(format, zeros)
    return make(copies[0], dense)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("peer", PEERS, ids=lambda name: name.replace(" ", "-"))
@torch.no_grad()
def test_cpu_peers(interleave, table, peer, rows):
    _, format, zeros, tolerance, *mode = PEERS[peer]
    compute = mode[0] if mode else "exact"
    copies, dense = case(format, zeros)
    others = contender(peer)
    x = torch.randn(rows, K)
    expected = x @ dense.T
    error = ((others[0](x) - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"{peer} computes something else: relative error {error:.2e}"
    weights = [dense, dense.clone()]
    times = interleave(
        {
            "dense": [lambda w=w: torch.nn.functional.linear(x, w) for w in weights],
            "peer": [lambda call=call: call(x) for call in others],
            "packed": [partial(PackedLinear(w, compute=compute), x) for w in copies],
        }
    )
    medians = {who: t["median"] for who, t in times.items()}
    table.add("cpu", "peers", {
        "peer": peer, "format": format, "compute": compute, "n": N, "k": K, "rows": rows,
        "dense_ms": medians["dense"] * 1e3,
        "peer_ms": medians["peer"] * 1e3, "packed_ms": medians["packed"] * 1e3,
        "peer_over_dense": medians["dense"] / medians["peer"],
        "packed_over_dense": medians["dense"] / medians["packed"],
        "packed_over_peer": medians["peer"] / medians["packed"], "peer_error": error,
    })  # fmt: skip
