"""Our kernels beside other libraries' on a GPU, in one interleaved run. **No undisturbed run is recorded yet.**

A peer that is not installed, or that this GPU or this PyTorch lacks, is skipped with its reason. Each computes the
product of the same codes (bitsandbytes: of a grid of its own; 2:4: of the same numbers) and is checked before it is
timed. Weights rotate through more memory than the L2 cache holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from bench.gpu import copies_to_overflow, race
from ctp_kernels import PackedWeight, pack, parse_format

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu
SHAPES = [(4096, 4096), (11008, 4096)]
ROWS = [1, 16, 64, 256]
#: A product (x or dy) -> y or dx, for one copy of the weight.
Call = Callable[[torch.Tensor], torch.Tensor]


def torch_int4(packed: PackedWeight, dense: torch.Tensor) -> Call:
    """torch.ops.aten._weight_int4pack_mm ("tinygemm"): bf16, groups of 128."""
    n, k = packed.shape
    codes = packed.codes()
    bytes_ = codes[:, ::2] << 4 | codes[:, 1::2]  # what the operator takes on a GPU: the even code in the high half
    weight = torch.ops.aten._convert_weight_to_int4pack(bytes_.contiguous(), 8)
    scales = packed.buffers["scales"].bfloat16().view(n, k // 128)
    grid = torch.stack([scales, torch.zeros_like(scales)], dim=2).transpose(0, 1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, weight, 128, grid)


def gemlite(packed: PackedWeight, dense: torch.Tensor) -> Call:
    """A16Wn, 4 bits, groups of 128."""
    helper = pytest.importorskip("gemlite.helper")
    scales = packed.buffers["scales"].bfloat16()
    maker = helper.A16Wn(device="cuda", dtype=torch.bfloat16)
    layer = maker.from_weights(
        packed.codes(), scales.view(-1, 1), torch.full_like(scales.view(-1, 1), 8), W_nbits=4, group_size=128, bias=None
    )
    return lambda x: layer(x)


def bitsandbytes(packed: PackedWeight, dense: torch.Tensor) -> Call:
    """Linear4bit, nf4."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        packed.shape[1], packed.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(dense.clone(), requires_grad=False, quant_type="nf4")
    return layer.to("cuda")


def bitsandbytes_dx(packed: PackedWeight, dense: torch.Tensor) -> Call:
    """dX as its backward makes it: the whole weight is written out, then multiplied."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes(packed, dense)
    weight = layer.weight  # type: ignore[attr-defined]

    def dx(dy: torch.Tensor) -> torch.Tensor:
        return dy @ bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(dy.dtype)

    return dx


def cusparselt(packed: PackedWeight, dense: torch.Tensor) -> Call:
    """2:4 through torch.sparse.to_sparse_semi_structured."""
    if not torch.backends.cusparselt.is_available():
        pytest.skip("this PyTorch has no cuSPARSELt")
    weight = torch.sparse.to_sparse_semi_structured(dense)
    return lambda x: torch.nn.functional.linear(x, weight)


#: name -> (contender, format, direction, relative error allowed)
PEERS = {
    "torch int4": (torch_int4, "int4", "forward", 2e-2),
    "gemlite int4": (gemlite, "int4", "forward", 2e-2),
    "bitsandbytes nf4": (bitsandbytes, "int4", "forward", 0.3),
    "bitsandbytes nf4 dX": (bitsandbytes_dx, "int4", "dX", 0.3),
    "cuSPARSELt": (cusparselt, "sparse24-bf16", "forward", 2e-2),
}


@lru_cache(maxsize=1)
def case(format: str, shape: tuple[int, int]) -> tuple[PackedWeight, list[list[torch.Tensor]], list[torch.Tensor]]:
    generator = torch.Generator("cuda").manual_seed(0)
    packed = pack(torch.randn(*shape, generator=generator, device="cuda"), parse_format(format))
    dense = packed.unpack(torch.bfloat16)
    copies = [[t.clone() for t in packed.tensors] for _ in range(copies_to_overflow(packed.nbytes))]
    return packed, copies, [dense.clone() for _ in range(copies_to_overflow(dense.nbytes))]


@lru_cache(maxsize=1)
def contender(peer: str, shape: tuple[int, int]) -> list[Call]:
    make, format, *_ = PEERS[peer]
    packed, copies, dense = case(format, shape)
    return [make(packed, dense[0]) for _ in copies]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("peer", PEERS, ids=lambda name: name.replace(" ", "-"))
@torch.no_grad()
def test_gpu_peers(table, peer, shape, rows, mode):
    _, format, direction, tolerance = PEERS[peer]
    packed, copies, dense = case(format, shape)
    others, (n, k), name = contender(peer, shape), shape, packed.format.name
    x = torch.randn(rows, k if direction == "forward" else n, device="cuda", dtype=torch.bfloat16)
    expected = x.float() @ (dense[0].T if direction == "forward" else dense[0]).float()
    error = ((others[0](x).float() - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"{peer} computes something else: relative error {error:.2e}"
    if direction == "forward":
        ours = [lambda w=w: torch.ops.ctp.matmul(x, w, None, name, n, "auto") for w in copies]
        plain = [lambda w=w: torch.nn.functional.linear(x, w) for w in dense]
    else:
        ours = [lambda w=w: torch.ops.ctp.matmul_t(x, w, name, k, "auto") for w in copies]
        plain = [lambda w=w: x @ w for w in dense]
    times = race(
        {"dense": plain, "peer": [lambda call=call: call(x) for call in others], "packed": ours}, graph=mode == "graph"
    )
    medians = {who: t["median"] for who, t in times.items()}
    table.add("cuda", "gpu_peers", {
        "peer": peer, "format": format, "direction": direction, "n": n, "k": k, "rows": rows, "mode": mode,
        "dense_us": medians["dense"] * 1e6, "peer_us": medians["peer"] * 1e6, "packed_us": medians["packed"] * 1e6,
        "peer_over_dense": medians["dense"] / medians["peer"],
        "packed_over_dense": medians["dense"] / medians["packed"],
        "packed_over_peer": medians["peer"] / medians["packed"], "peer_error": error,
    })  # fmt: skip
