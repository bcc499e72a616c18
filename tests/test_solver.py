"""The solver on single weights: what it must equal, what it must keep, what it must refuse."""

from __future__ import annotations

import logging

import pytest
import torch

from ctp.compress.hessian import Hessian, inverse_factor
from ctp.compress.solver import METHODS, SWEEPS, solve
from ctp_kernels import CTPError, pack, parse_format
from ctp_kernels.patterns import is_sparse24
from tests.helpers import FORMAT_NAMES


def case(n: int = 24, k: int = 64, seed: int = 0, rows: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (N, K) and the Hessian of correlated inputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    x = torch.randn(rows, k, generator=generator) @ torch.randn(k, k, generator=generator)
    x = x * torch.exp(torch.randn(k, generator=generator))
    return weight, 2 / rows * x.T @ x


def output_error(weight: torch.Tensor, dense: torch.Tensor, hessian: torch.Tensor) -> float:
    lost = (weight - dense).double()
    return float((lost @ hessian.double() * lost).sum() / (weight.double() @ hessian.double() * weight).sum())


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "gptq"])
def test_packs_to_what_it_decided(name: str, method: str) -> None:
    format = parse_format(name)
    weight, hessian = case(n=10, k=44)
    if method not in SWEEPS and (method == "rtn") != (format.pattern == "dense"):
        with pytest.raises(CTPError, match="use "):
            solve(weight, hessian, format, method=method)
        return
    for act_order in (True, False) if method in SWEEPS else (True,):
        solution = solve(weight, hessian, format, method=method, act_order=act_order)
        packed = solution.pack(torch.float32)
        assert torch.equal(packed.unpack(), solution.dense())
        if solution.mask is not None:
            assert torch.equal(packed.mask(), solution.mask)
            assert (packed.unpack()[~solution.mask] == 0).all()
        assert solution.error == pytest.approx(output_error(weight, solution.dense(), hessian), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["int4", "sparse24", "unstructured-int3-g24-asym"])
def test_gptq_and_sparsegpt_are_one_sweep(name: str) -> None:
    weight, hessian = case()
    one, other = (solve(weight, hessian, name, method=method) for method in SWEEPS)
    assert torch.equal(one.stored, other.stored)


@pytest.mark.parametrize("name", ["int4", "int3-g24-asym", "int2-row", "int8-g64"])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_without_correlation_is_rounding(name: str, act_order: bool) -> None:
    weight, _ = case(k=172)
    diagonal = torch.diag(torch.rand(172) + 0.1)
    ours = solve(weight, diagonal, name, method="gptq", act_order=act_order).pack(torch.float32)
    plain = pack(weight, name)
    for buffer, tensor in plain.buffers.items():
        assert torch.equal(ours.buffers[buffer], tensor), buffer


def naive_obs(weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, block: int) -> torch.Tensor:
    """SparseGPT as its paper derives it: after each input, the inverse Hessian of the inputs that are left, anew."""
    w, h = weight.double().clone(), hessian.double()
    n, k = w.shape
    h = h + 0.01 * h.diagonal().mean() * torch.eye(k)
    pruned = torch.zeros(n, k, dtype=torch.bool)
    for j in range(k):
        if j % block == 0:
            end = min(j + block, k)
            saliency = torch.stack([w[:, c] ** 2 / torch.linalg.inv(h[c:, c:])[0, 0] for c in range(j, end)], dim=1)
            lowest = saliency.flatten().argsort()[: round(sparsity * saliency.numel())]
            pruned[:, j:end] = torch.zeros(saliency.numel(), dtype=torch.bool).scatter(0, lowest, True).view(n, -1)
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= torch.where(pruned[:, j], w[:, j] / inverse[0, 0], 0.0)[:, None] * inverse[0]
        w[pruned[:, j], j] = 0
    return w


def test_sparsegpt_equals_naive_optimal_brain_surgeon() -> None:
    weight, hessian = case(n=6, k=44)
    ours = solve(weight, hessian, "unstructured", method="sparsegpt", block_size=16, mask_scope="block")
    assert torch.allclose(ours.dense().double(), naive_obs(weight, hessian, 0.5, 16), atol=1e-4)


def test_gptq_equals_naive_column_by_column() -> None:
    weight, hessian = case(n=6, k=40)
    ours = solve(weight, hessian, "int4-row", act_order=False, block_size=16)
    assert ours.scales is not None
    scales, w, h = ours.scales.double(), weight.double().clone(), hessian.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(40)
    for j in range(40):
        inverse = torch.linalg.inv(h[j:, j:])
        rounded = scales[:, 0] * torch.round(w[:, j] / scales[:, 0]).clamp(-8, 7)
        w[:, j:] -= ((w[:, j] - rounded) / inverse[0, 0])[:, None] * inverse[0]
        w[:, j] = rounded
    assert (ours.dense().double() - w).abs().max() < 1e-5


@pytest.mark.parametrize("scope", ["layer", "block", "row"])
def test_joint_at_many_bits_prunes_as_sparsegpt(scope: str) -> None:
    weight, hessian = case()
    joint = solve(weight, hessian, "unstructured-int8-g8", act_order=False, mask_scope=scope)
    sparse = solve(weight, hessian, "unstructured", mask_scope=scope)
    assert joint.mask is not None and sparse.mask is not None
    assert float((joint.mask == sparse.mask).float().mean()) > 0.95
    assert joint.error == pytest.approx(sparse.error, rel=0.05)


@pytest.mark.parametrize("act_order", [True, False])
def test_joint_without_pruning_is_gptq(act_order: bool) -> None:
    weight, hessian = case()
    joint = solve(weight, hessian, "unstructured-int3-g24", sparsity=0.0, act_order=act_order)
    dense = solve(weight, hessian, "int3-g24", act_order=act_order)
    assert joint.mask is not None and joint.mask.all()
    assert torch.equal(joint.stored, dense.stored)


def test_act_order_leaves_inputs_in_place() -> None:
    """Two groups of very different size, inputs of both among the first of the order: each keeps its own scale."""
    weight, hessian = case(k=48)
    weight[:, 24:] *= 100
    ordered = solve(weight, hessian, "int4-g24", act_order=True)
    assert ordered.scales is not None
    assert (ordered.scales[:, 1] > 10 * ordered.scales[:, 0]).all()
    assert torch.equal(ordered.scales, pack(weight, "int4-g24").buffers["scales"])


@pytest.mark.parametrize("name", ["int4-row", "int3-row-asym"])
def test_act_order_does_not_depend_on_where_inputs_lie(name: str) -> None:
    weight, hessian = case(k=44)
    shuffle = torch.randperm(44, generator=torch.Generator().manual_seed(3))
    straight = solve(weight, hessian, name)
    shuffled = solve(weight[:, shuffle], hessian[shuffle][:, shuffle], name)
    assert torch.equal(shuffled.stored, straight.stored[:, shuffle])


def test_act_order_helps_where_inputs_differ() -> None:
    weight, hessian = case(k=128)
    assert solve(weight, hessian, "int3").error < solve(weight, hessian, "int3", act_order=False).error


@pytest.mark.parametrize("group", ["g8", "g24", "g64", "g136", "row"])
@pytest.mark.parametrize("asym", ["", "-asym"])
def test_group_grid_is_fitted_on_weights_that_carry_the_error(group: str, asym: str) -> None:
    """Groups that align with neither the block nor K: replay the sweep one input at a time, and compare all grids."""
    weight, hessian = case(n=5, k=172)
    name = f"int4-{group}{asym}"
    ours = solve(weight, hessian, name, act_order=False, block_size=32)
    assert ours.scales is not None
    size = parse_format(name).group_size or 172
    w, dense = weight.double().clone(), ours.dense().double()
    h = hessian.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(172)
    for j in range(172):
        if j % size == 0:
            expected = pack(w[:, j : j + size].float(), f"int4-row{asym}").buffers["scales"]
            assert torch.allclose(ours.scales[:, j // size].float(), expected[:, 0].float(), rtol=2e-3), f"group at {j}"
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= ((w[:, j] - dense[:, j]) / inverse[0, 0])[:, None] * inverse[0]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["sparse24", "sparse24-int4-g24-asym", "sparse24-int3"])
def test_two_of_every_four(method: str, name: str) -> None:
    weight, hessian = case(k=172)
    solution = solve(weight, hessian, name, method=method)
    assert solution.mask is not None
    assert (solution.mask.view(24, 43, 4).sum(-1) == 2).all()
    assert is_sparse24(solution.dense())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("k", [64, 172])
def test_scopes_prune_what_they_say(sparsity: float, k: int) -> None:
    weight, hessian = case(n=16, k=k)
    weight *= torch.linspace(0.2, 3, 16)[:, None]
    kept = {}
    for scope in ("layer", "block", "row"):
        solution = solve(weight, hessian, "unstructured", sparsity=sparsity, block_size=32, mask_scope=scope)
        assert solution.mask is not None
        kept[scope] = solution.mask
    edges = [(first, min(first + 32, k)) for first in range(0, k, 32)]
    for first, last in edges:
        part = last - first
        assert int((~kept["block"][:, first:last]).sum()) == round(sparsity * 16 * part)
    assert int((~kept["layer"]).sum()) == round(sparsity * 16 * k)
    assert ((~kept["row"]).sum(1) == round(sparsity * k)).all()
    if sparsity == 0.5:
        assert kept["block"].sum(1).unique().numel() > 1, "rows of a block may end with different sparsity"


def test_layer_scope_loses_less_than_published_blocks() -> None:
    weight, hessian = case(n=64, k=172)
    error = {s: solve(weight, hessian, "unstructured", mask_scope=s).error for s in ("layer", "block", "row")}
    assert error["layer"] < min(error["block"], error["row"])


@pytest.mark.parametrize("name", ["int4", "sparse24", "sparse24-int3-row-asym", "unstructured", "unstructured-int4"])
def test_dead_inputs_become_zero_and_cost_nothing(name: str) -> None:
    weight, hessian = case()
    hessian[5], hessian[:, 5] = 0, 0
    hessian[40:44], hessian[:, 40:44] = 0, 0
    solution = solve(weight, hessian, name)
    dense = solution.dense()
    assert (dense[:, 5] == 0).all() and (dense[:, 40:44] == 0).all()
    assert solution.damping == 0.01
    assert solution.error == pytest.approx(output_error(weight, dense, hessian), rel=1e-3)


def test_all_inputs_dead_gives_zeros() -> None:
    weight, _ = case()
    solution = solve(weight, torch.zeros(64, 64), "int4")
    assert (solution.dense() == 0).all() and solution.error == 0.0


def test_singular_hessian_grows_the_damping_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    weight, _ = case()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)) * 100
    with caplog.at_level(logging.WARNING):
        solution = solve(weight, x.T @ x, "int4", percdamp=1e-12)
    assert solution.damping > 1e-12
    assert "Cholesky failed" in caplog.text
    assert torch.isfinite(solution.dense()).all()


def test_hopeless_hessian_is_refused() -> None:
    weight, hessian = case()
    with pytest.raises(CTPError, match="positive definite"):
        solve(weight, -hessian, "int4")


def test_inverse_factor() -> None:
    _, hessian = case()
    factor, damping = inverse_factor(hessian, 0.01)
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(64)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T.double() @ factor.double() @ damped, torch.eye(64).double(), atol=1e-3)


def test_hessian_is_the_mean_whatever_the_batches() -> None:
    x = torch.randn(6, 50, 16, generator=torch.Generator().manual_seed(0)) * 30
    whole, parts = Hessian(16, x.device), Hessian(16, x.device)
    whole.add(x)
    for batch in x.split(4):
        parts.add(batch)
    flat = x.view(-1, 16).double()
    expected = 2 / 300 * flat.T @ flat
    assert torch.allclose(whole.mean().double(), expected, rtol=1e-5, atol=1e-2)
    assert torch.allclose(parts.mean(), whole.mean(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("name", ["int3", "int3-asym", "sparse24-int3"])
def test_mse_grid_loses_less(name: str) -> None:
    weight, hessian = case(k=128)
    assert solve(weight, hessian, name, mse=True).error < solve(weight, hessian, name).error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["int4", "sparse24", "unstructured"])
def test_half_weights_keep_their_dtype(dtype: torch.dtype, name: str) -> None:
    weight, hessian = case()
    solution = solve(weight.to(dtype), hessian, name)
    packed = solution.pack(dtype)
    assert packed.dtype == dtype and packed.unpack().dtype == dtype
    if not solution.format.quantized:
        assert packed.buffers["values"].dtype == dtype


def test_named_value_dtype_is_stored_and_unpacks_to_the_weights() -> None:
    weight, hessian = case()
    packed = solve(weight, hessian, "sparse24-fp16").pack(torch.float32)
    assert packed.buffers["values"].dtype == torch.float16 and packed.dtype == torch.float32


def test_zero_weight() -> None:
    _, hessian = case()
    for name in ("int4", "int3-asym", "sparse24-int4", "unstructured"):
        solution = solve(torch.zeros(24, 64), hessian, name)
        assert (solution.dense() == 0).all() and solution.error == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "obc"}, "unknown method"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"block_size": 12}, "block size"),
        ({"percdamp": -1.0}, "damping"),
        ({"mask_scope": "column"}, "mask scope"),
        ({"hessian": None}, "needs calibration"),
        ({"hessian": torch.full((64, 64), float("inf"))}, "NaN or infinite"),
        ({"weight": torch.full((4, 64), float("nan"))}, "NaN or infinite"),
        ({"weight": torch.ones(4, 62), "hessian": torch.eye(62), "format": "sparse24"}, "multiple of 4"),
    ],
)
def test_bad_requests(change: dict, message: str) -> None:
    weight, hessian = case(n=4)
    request = {"weight": weight, "hessian": hessian, "format": "int4", **change}
    with pytest.raises(CTPError, match=message):
        solve(**request)
