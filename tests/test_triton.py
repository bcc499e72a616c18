"""The arithmetic of the Triton kernels, in Triton's interpreter on the CPU, against the unpacked weight.

The interpreter is switched on by an environment variable that Triton reads when it is imported, so all of it runs in
one child process (`python -m tests.test_triton`), which prints what went wrong with each check. What the compiler
makes of the kernels is in test_triton_compile.py.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from ctp_kernels import FORMATS, CTPError, PackedLinear, PackedWeight, pack, parse_format
from ctp_kernels.backends import row_class
from ctp_kernels.backends import triton as backend
from ctp_kernels.backends.triton.plan import Plan, default_plan, dense_plan, plan_for, widens
from tests.helpers import weight_for

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDOFF = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}

#: What the table of formats lacks: other groups, and zeros.
VARIANTS = [
    *("int4-asym", "int8-asym", "int4-row", "int4-row-asym", "int4-g256", "int4-g512", "int3-g64-asym", "int2-g8-asym"),
    *("int4-g24", "int2-row-asym", "sparse24-int4-g24-asym", "sparse24-int3-row-asym", "sparse24-int2-g32-asym"),
    *("unstructured-int4-g64-asym", "unstructured-int3-row", "unstructured-int8-asym", "unstructured-int2-g8"),
]
#: Every format at a ragged shape; activations by turns.
EVERY = {
    f"{name}-{dtype}": (name, (37, 204), dtype)
    for at, name in enumerate([*FORMATS, *VARIANTS])
    for dtype in [("fp16", "bf16")[at % 2]]
}

DENSE = {"kind": "dense", "block_n": 16, "block_k": 128}
#: hazard: format, (N, K), M, activations, and what to replace in the plan of forward and backward
HAZARDS: dict[str, tuple] = {
    "m8_in_the_decode_kernel": ("int4-asym", (21, 300), 8, "fp16", {"kind": "decode", "block_m": 8}),
    "m3_decode_ragged": ("unstructured-int4", (9, 203), 3, "bf16", {"kind": "decode", "block_m": 4}),
    "m17_ragged_everything": ("int4", (70, 203), 17, "fp16", {}),
    "m65_large_tiles": ("int4-asym", (130, 72), 65, "fp16", {}),
    "m65_sparse24": ("sparse24-int4", (70, 76), 65, "fp16", {}),
    "m65_unstructured": ("unstructured-int3", (70, 76), 65, "fp16", {}),
    "n1_k_below_one_tile": ("int4", (1, 12), 2, "fp32", {}),
    "n1_sparse24": ("sparse24-int3", (1, 12), 2, "fp16", {}),
    "n1_unstructured": ("unstructured-fp32", (1, 5), 3, "fp32", {}),
    "k250_codes_off_words": ("int2", (9, 250), 3, "bf16", {}),
    "k104_half_a_word_of_slots": ("sparse24-int3", (9, 104), 3, "fp16", {}),
    "k160_mask_off_16_bytes": ("unstructured-int4-asym", (9, 160), 3, "fp16", {}),
    "fp32_activations": ("int4-asym", (35, 203), 18, "fp32", {}),
    "fp32_activations_g8": ("int3-g8-asym", (35, 203), 18, "fp32", {}),
    "fp32_activations_unstructured": ("unstructured-int8", (20, 140), 18, "fp32", {}),
    "bf16_values_fp32_activations": ("bf16", (9, 140), 3, "fp32", {}),
    "fp16_values_bf16_activations": ("sparse24-fp16", (9, 140), 3, "bf16", {}),
    "fp32_values_fp16_activations": ("unstructured-fp32", (9, 140), 1, "fp16", {}),
    "seven_splits_of_five_tiles": ("int4", (40, 600), 3, "fp16", {"splits": 7}),
    "three_splits_the_last_short": ("int4-asym", (40, 600), 3, "fp16", {"splits": 3}),
    "decode_in_two_splits": ("sparse24-int4", (40, 1100), 1, "fp16", {"splits": 2}),
    "decode_in_eight_splits": ("unstructured-int3-asym", (40, 600), 1, "bf16", {"splits": 8}),
    "dense_product": ("sparse24-int3-asym", (37, 204), 5, "fp16", DENSE),
    "dense_product_unstructured": ("unstructured-bf16", (37, 204), 5, "bf16", DENSE),
    "dense_product_of_other_dtype": ("fp32", (37, 204), 5, "fp16", DENSE),
}  # fmt: skip


def problem(name, shape, m, dtype, device="cpu"):
    torch.manual_seed(0)
    format = parse_format(name)
    packed = pack(weight_for(format, *shape), format).to(device)
    n, k = shape
    x, dy, bias = (torch.randn(size).to(device, DTYPES[dtype]) for size in ((m, k), (m, n), (n,)))
    return packed, x, dy, bias.repeat_interleave(2)[::2]  # not in one piece


def forward(packed, x, bias=None, change=None):
    from ctp_kernels.backends.triton import launch

    return launch.matmul(x, packed.tensors, packed.format, packed.shape[0], bias, plan(packed, x, "forward", change))


def backward(packed, dy, change=None):
    from ctp_kernels.backends.triton import launch

    if change and change.get("kind") == "decode":
        change = None
    return launch.matmul_t(dy, packed.tensors, packed.format, packed.shape[1], plan(packed, dy, "backward", change))


def plan(packed, x, direction, change) -> Plan:
    made = plan_for(packed.format, x.dtype, row_class(max(len(x), 1)), packed.shape, direction)
    return replace(made, **change) if change else made


def error_of(got, x, weight, bias, packed) -> str:
    """What is wrong with got = x weight^T + bias, or "": one rounding of the result, a rounding of fp32 for every sum,
    and one of every entry, which a dense layer of x's dtype has too."""
    exact = torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    # The interpreter cuts fp32 to bf16 where a GPU rounds: one bit less.
    roundoff = ROUNDOFF[got.dtype] * (2 if got.dtype == torch.bfloat16 and got.device.type == "cpu" else 1)
    along = (x.shape[1] + 2) * 2**-24 + (roundoff if packed.format.quantized else 0)
    allowed = roundoff * exact.abs() + along * (x.double().abs() @ weight.abs().T + 1)
    error = (got.double() - exact).abs()
    if not (error <= allowed).all():
        return f"{(error / allowed).max().item():.3g} times the allowed error"
    dense = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    times = 3 * (2 if got.dtype == torch.bfloat16 and got.device.type == "cpu" else 1)
    bound = times * (dense.double() - exact).norm() + 2**-22 * exact.norm()
    return "" if error.norm() <= bound else f"{error.norm() / bound * times:.3g} times the error of a dense product"


def errors_of(packed, x, dy, bias, change=None) -> str:
    weight = packed.unpack(torch.float64)
    wrong = {
        "forward": error_of(forward(packed, x, bias, change), x, weight, bias, packed),
        "backward": error_of(backward(packed, dy, change), dy, weight.T.contiguous(), None, packed),
    }
    return "; ".join(f"{direction}: {error}" for direction, error in wrong.items() if error)


def one_hot_errors(packed, dtype) -> str:
    """What is wrong, or "" if one-hot rows give back the decoded weight bit for bit, by all kernels."""
    n, k = packed.shape
    device = packed.tensors[0].device
    rows, columns = torch.eye(k, dtype=dtype, device=device), torch.eye(n, dtype=dtype, device=device)
    got = {
        "forward": forward(packed, rows).T,
        "decode": torch.cat([forward(packed, rows[at : at + 2]) for at in range(k - 4, k, 2)]).T,
        "backward": backward(packed, columns),
        "dense": backward(packed, columns, dense_plan(packed.format).to_dict()),
    }
    rounded = packed.unpack(dtype)
    cut = (packed.unpack(torch.float32).view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
    wrong = []
    for kernel, weight in got.items():
        expected, shortened = (w[:, -4:] if kernel == "decode" else w for w in (rounded, cut))
        interpreted = dtype == torch.bfloat16 and device.type == "cpu"
        if not torch.equal(weight, expected) and not (interpreted and torch.equal(weight, shortened)):
            wrong.append(f"{kernel}: {int((weight != expected).sum())} entries differ from the weight")
    return "; ".join(wrong)


def strided(device):
    packed, x, dy, bias = problem("int4-g64-asym", (9, 200), 2, "bf16", device)
    return errors_of(packed, torch.cat([x, x], 1)[:, : x.shape[1]], torch.cat([dy, dy], 1)[:, :9], bias)


def transposed(device):
    packed, x, dy, bias = problem("int4-g64-asym", (9, 200), 2, "bf16", device)
    return errors_of(packed, x.T.contiguous().T, dy.T.contiguous().T, bias)


def no_bias(device):
    packed, x, dy, _ = problem("int4-g64-asym", (9, 200), 2, "bf16", device)
    return errors_of(packed, x, dy, None)


def empty(device):
    packed, x, dy, bias = problem("int4-g64-asym", (9, 200), 2, "bf16", device)
    shapes = forward(packed, x[:0], bias).shape, backward(packed, dy[:0]).shape
    return "" if shapes == ((0, 9), (0, 200)) else f"wrong shapes {shapes}"


def off_words(name, device):
    """Buffers that do not begin on 4 bytes."""
    from ctp_kernels.backends.triton import launch

    packed, x, dy, bias = problem(name, (9, 256), 3, "fp16", device)
    moved = {key: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) if t.dtype == torch.uint8 else t
             for key, t in packed.buffers.items()}  # fmt: skip
    assert not launch._on_words(list(moved.values()))  # the interpreter would forgive words off their place
    return errors_of(PackedWeight(packed.format, packed.shape, packed.dtype, moved), x, dy, bias)


def layer(name, device):
    """As a model runs it: choose(), the operators, autograd, the rule."""
    packed, x, dy, bias = problem(name, (70, 268), 5, "fp16", device)
    weight = packed.unpack(torch.float64)
    y = PackedLinear(packed, bias, "triton")(x.requires_grad_())
    (dx,) = torch.autograd.grad(y, x, dy)
    wrong = {
        "forward": error_of(y.detach(), x.detach(), weight, bias, packed),
        "backward": error_of(dx, dy, weight.T.contiguous(), None, packed),
    }
    return "; ".join(f"{direction}: {error}" for direction, error in wrong.items() if error)


def far_rows(device):
    """4 GB of addresses, of which three rows are touched (on a GPU, allocated)."""
    packed, x, _, bias = problem("int4", (9, 140), 3, "fp16", device)
    far = torch.empty(2 * 2**30 + 140, dtype=torch.float16, device=device).as_strided((3, 140), (2**30, 1))
    far.copy_(x)
    return error_of(forward(packed, far, bias), x, packed.unpack(torch.float64), bias, packed)


def tuning(name, device):
    """Every plan that tuning tries gives the same product, and the plan that the clock likes best is kept and used."""
    from ctp_kernels.backends.triton import tuned, warmup

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(tuned, "user_file", lambda: Path(folder) / "t.json"),
    ):
        packed, _, _, bias = problem(name, (20, 140), 1, "fp16", device)
        weight = warmup.Weight(packed.format, packed.shape, packed.tensors, bias)
        turn = iter(range(1000, 0, -1))  # later candidates are faster: the dense product, which comes last
        told: list[int] = []
        result = warmup.warm_up(
            [weight], torch.float16, rows=(1, 3), tune=True, seconds=lambda call: next(turn), progress=told.append
        )
        kept = tuned.read(Path(folder) / "t.json")[result["gpu"] or "interpreter"]
    for cached in (tuned._table, plan_for):
        cached.cache_clear()
    right = len(told) == result["kernels"] == 4 and {plan["kind"] for plan in kept.values()} == {"dense"}
    return "" if right else f"{result}"


def every(case, m, device):
    name, shape, dtype = EVERY[case]
    packed, x, dy, bias = problem(name, shape, m, dtype, device)
    for direction, of in (("forward", x), ("backward", dy)):
        reason = backend.unsupported(packed.format, packed.shape, of.dtype, of.device, direction)
        assert reason is None, reason
    return errors_of(packed, x, dy, bias)


def one_hot(case, device):
    name, _, dtype = EVERY[case]
    return one_hot_errors(problem(name, (20, 140), 1, dtype, device)[0], DTYPES[dtype])


def hazard(case, device):
    name, shape, m, dtype, change = HAZARDS[case]
    return errors_of(*problem(name, shape, m, dtype, device), change)


#: Every check: name -> a function of the device that says what is wrong, or "".
CHECKS = {
    **{f"m{m}-{case}": partial(every, case, m) for case in EVERY for m in (1, 3)},
    **{f"one_hot-{case}": partial(one_hot, case) for case in EVERY},
    **{case: partial(hazard, case) for case in HAZARDS},
    **{check.__name__: check for check in (strided, transposed, no_bias, empty)},
    **{f"off_words-{name}": partial(off_words, name) for name in ("int4", "int3", "int8", "unstructured-int2")},
    **{f"layer-{name}": partial(layer, name) for name in ("int3-asym", "unstructured-int4")},
    "rows_2^30_apart": far_rows,
    **{f"tuning-{name}": partial(tuning, name) for name in ("int4", "unstructured-int3-asym")},
}


@pytest.fixture(scope="module")
def interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.test_triton"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(interpreted, check):
    assert interpreted[check] == ""


@pytest.mark.parametrize(
    "name,dtype,device,direction,compute,reason",
    [
        ("int4", torch.float64, "cuda", "backward", "exact", "activations are float64"),
        ("int4", torch.float16, "cuda", "forward", "int8", "no int8 activations"),
        ("int4", torch.float16, "cpu", "forward", "exact", "tensors are on cpu, not on a CUDA device"),
    ],
)
def test_what_it_cannot_do_it_says(name, dtype, device, direction, compute, reason):
    assert reason in backend.unsupported(parse_format(name), (8, 64), dtype, torch.device(device), direction, compute)


def test_rows_far_apart_are_brought_together():
    """The last token of a few very long sequences: a row of x begins more than 2^31 elements after the first."""
    from ctp_kernels.backends.triton.launch import _near

    wide = torch.empty(3, 2**21, 1024, device="meta")
    assert _near(wide[:, -1, :]).stride() == (1024, 1)
    assert _near(wide[0, :4, :16]).stride() == (1024, 1)


def test_a_bias_of_another_length_is_refused():
    from ctp_kernels.backends.triton import launch

    packed, x, _, bias = problem("int4", (16, 128), 1, "fp16")
    with pytest.raises(CTPError, match="bias of shape"):
        launch.matmul(x, packed.tensors, packed.format, 16, bias[:4])


@pytest.mark.parametrize("name", [*FORMATS, *VARIANTS])
def test_plans_fit_the_format(name):
    """Tiles that the kernels take: powers of two, 128 inputs for unstructured, a workspace smaller than the weight."""
    format = parse_format(name).with_dtype(torch.float16)
    for direction in ("forward", "backward"):
        for m in (1, 2, 4, 16, 64, 256, 4096):
            for n, k in ((4096, 4096), (11008, 4096), (4096, 11008), (96, 172)):
                plan = default_plan(format, torch.float16, m, (n, k), direction, 132)
                sizes = (plan.block_n, plan.block_k, max(plan.block_m, 1), plan.splits, plan.warps)
                assert all(size & (size - 1) == 0 for size in sizes)
                assert format.pattern != "unstructured" or plan.block_k == 128
                assert plan.splits == 1 or plan.splits * m <= 256
                assert plan.kind != "decode" or plan.block_m == m <= 8
                for dtype in (torch.float16, torch.float32):
                    found = default_plan(format, dtype, m, (n, k), direction, 132)
                    assert (found.kind == "dense") == goes_dense(format, dtype, m, direction)


def goes_dense(format, dtype, m, direction):
    if direction == "forward" and m <= 2:
        return False
    if format.pattern == "unstructured" and m > (32 if direction == "forward" else 0 if format.quantized else 16):
        return True
    return m >= 128 or dtype == torch.float32 or widens(format, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check):
    assert CHECKS[check]("cuda") == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["int4", "unstructured-int3", "sparse24-int4", "bf16"])
def test_a_hundred_runs_give_the_same_bits(name):
    packed, x, dy, bias = problem(name, (1024, 1152), 17, "bf16", "cuda")
    first = forward(packed, x, bias), forward(packed, x[:1], bias), backward(packed, dy)
    for _ in range(100):
        again = forward(packed, x, bias), forward(packed, x[:1], bias), backward(packed, dy)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


if __name__ == "__main__":
    print(json.dumps({name: check("cpu") for name, check in CHECKS.items()}))
