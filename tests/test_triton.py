"""The Triton kernel: in Triton's interpreter against the unpacked weight, and compiled ahead of time for real GPUs.

The interpreter is switched on by an environment variable that Triton reads when it is imported, so all of that runs
in one child process (`python -m tests.test_triton`), which prints what went wrong with each case.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from ctp_kernels import pack, parse_format
from ctp_kernels.backends import triton as backend

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDOFF = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}

#: hazard: format, (N, K), M, activations
CASES = {
    "m1": ("int4", (64, 256), 1, "bf16"),
    "m1_fp16": ("int4", (64, 256), 1, "fp16"),
    "m17_ragged_everything": ("int4", (70, 203), 17, "fp16"),
    "asym_ragged": ("int4-asym", (33, 203), 3, "bf16"),
    "asym_fp16": ("int4-asym", (5, 128), 2, "fp16"),
    "m65_large_tiles": ("int4-asym", (130, 72), 65, "fp16"),
    "n1_k_below_one_tile": ("int4", (1, 12), 2, "fp32"),
    "row_scale": ("int4-row", (9, 300), 2, "bf16"),
    "row_scale_asym_ragged": ("int4-row-asym", (9, 171), 2, "fp16"),
    "group_of_two_tiles": ("int4-g256", (9, 600), 1, "fp16"),
    "group_longer_than_k": ("int4-g512", (9, 320), 1, "fp16"),
    "group64": ("int4-g64-asym", (9, 200), 2, "bf16"),
    "group32": ("int4-g32", (9, 100), 2, "fp16"),
    "group8_scale_per_entry": ("int4-g8-asym", (9, 140), 2, "fp16"),
    "group24_scale_per_entry": ("int4-g24", (9, 140), 2, "bf16"),
    "fp32_activations": ("int4-asym", (35, 203), 18, "fp32"),
    "int8": ("int8", (9, 140), 2, "fp16"),
    "int8_asym_bf16_holds_255": ("int8-asym", (9, 140), 2, "bf16"),
    "int3_two_planes": ("int3", (9, 203), 2, "bf16"),
    "int3_asym": ("int3-g64-asym", (9, 203), 2, "fp16"),
    "int2": ("int2-g32-asym", (9, 140), 2, "bf16"),
    "fp16_values": ("fp16", (9, 140), 2, "fp16"),
    "bf16_values": ("bf16", (9, 140), 2, "bf16"),
    "bf16_values_fp32_activations": ("bf16", (9, 140), 2, "fp32"),
    "fp32_values": ("fp32", (9, 140), 2, "fp32"),
}


def problem(case, device="cpu"):
    name, shape, m, dtype = CASES[case]
    torch.manual_seed(0)
    packed = pack(torch.randn(shape), name).to(device)
    return packed, torch.randn(m, shape[1]).to(device, DTYPES[dtype]), torch.randn(shape[0]).to(device, DTYPES[dtype])


def per_entry(packed, k_tile=32):
    """Whether scale * (code - zero) is rounded to the activations' dtype before it is multiplied."""
    return (packed.format.group_size or 0) % k_tile != 0


def error_of(y, x, packed, bias) -> str:
    """What is wrong with y, or "": one rounding of the result, at most K of fp32 on the way."""
    weight = packed.unpack(torch.float64)
    exact = torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    # The interpreter cuts fp32 to bf16 where a GPU rounds: one bit less.
    roundoff = ROUNDOFF[y.dtype] * (2 if y.dtype == torch.bfloat16 and y.device.type == "cpu" else 1)
    along = (packed.shape[1] + 2) * 2**-24 + (roundoff if per_entry(packed) else 0)
    allowed = roundoff * exact.abs() + along * (x.double().abs() @ weight.abs().T + 1)
    worst = ((y.double() - exact).abs() / allowed).max().item()
    return "" if worst <= 1 else f"{worst:.3g} times the allowed error"


def run(packed, x, bias=None):
    return backend.matmul(x, packed.tensors, packed.format, packed.shape[0], bias)


def one_hot_error(packed, dtype) -> str:
    """What is wrong, or "" if one-hot rows give back the decoded weight bit for bit."""
    got = run(packed, torch.eye(packed.shape[1], dtype=dtype)).T
    rounded = packed.unpack(dtype)
    if torch.equal(got, rounded):
        return ""
    cut = (packed.unpack(torch.float32).view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
    if dtype == torch.bfloat16 and torch.equal(got, cut):
        return ""
    return f"{int((got != rounded).sum())} entries of a one-hot product differ from the weight"


def interpret() -> dict[str, str]:
    """Every check that needs the interpreter: name -> what is wrong, or ""."""
    found = {}
    for case in CASES:
        packed, x, bias = problem(case)
        reason = backend.unsupported(packed.format, packed.shape, x.dtype, x.device, "forward")
        found[case] = reason or error_of(run(packed, x, bias), x, packed, bias)
    for case in ("m17_ragged_everything", "asym_ragged", "group24_scale_per_entry", "int3_asym", "fp32_activations"):
        packed, x, _ = problem(case)
        found[f"one_hot-{case}"] = one_hot_error(packed, x.dtype)
    packed, x, bias = problem("group64")
    wide = torch.cat([x, x], 1)[:, : x.shape[1]]
    found["strided"] = error_of(run(packed, wide, bias), x, packed, bias)
    found["transposed"] = error_of(run(packed, x.T.contiguous().T, bias), x, packed, bias)
    found["no_bias"] = error_of(run(packed, x), x, packed, None)
    found["empty"] = "" if run(packed, x[:0]).shape == (0, 9) else "wrong shape"
    return found


CHECKS = [
    *CASES,
    *(f"one_hot-{case}" for case in ("m17_ragged_everything", "asym_ragged", "group24_scale_per_entry")),
    *("one_hot-int3_asym", "one_hot-fp32_activations", "strided", "transposed", "no_bias", "empty"),
]


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


def test_every_interpreter_check_is_listed(interpreted):
    assert list(interpreted) == CHECKS


# --- ahead of time: what the compiler makes of the variants that matmul chooses ------------------------------------

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
COMPILED = [("int4", "bf16", 1), ("int4-row-asym", "fp16", 64), ("int4-asym", "fp16", 512), ("int4-row", "bf16", 1)]


def compile_for(name: str, dtype: torch.dtype, m: int, capability: int, k: int = 4096):
    """The kernel that `matmul` launches for 16-byte aligned tensors, compiled for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ctp_kernels.backends.triton.kernel import matmul_kernel, variant

    if not isinstance(matmul_kernel, triton.JITFunction):
        pytest.skip("Triton's interpreter is switched on for this whole process")
    constants, options = variant(parse_format(name), dtype, m, k, True)
    number = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    signature = {"x": number, "stored": "*u8", "stored_hi": "*u8", "scales": "*fp16", "zeros": "*u8"}
    signature |= {"bias": number, "y": number, "M": "i32", "N": "i32", "ldx": "i32"}
    aligned = [at for at, argument in enumerate(signature) if argument != "M"]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(matmul_kernel, signature, constants, {(at,): [["tt.divisibility", 16]] for at in aligned})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled) -> dict[str, int]:
    """Registers and bytes of stack and local memory of a compiled kernel, from its machine code."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("name,dtype,m", COMPILED)
def test_compiles_to_tensor_core_code_without_spills(name, dtype, m, capability):
    compiled = compile_for(name, DTYPES[dtype], m, capability)
    ptx = compiled.asm["ptx"]
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx
    assert "cp.async" in ptx
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    used = resources(compiled)
    assert used["STACK"] == used["LOCAL"] == 0 and 0 < used["REG"] <= 255


def test_fp32_activations_never_pass_through_tf32():
    compiled = compile_for("int4-asym", torch.float32, 64, 80)
    assert "mma.sync" not in compiled.asm["ptx"] and "fma.rn.f32" in compiled.asm["ptx"]
    used = resources(compiled)
    assert used["STACK"] == used["LOCAL"] == 0


@pytest.mark.parametrize(
    "name,dtype,device,direction,reason",
    [
        ("int4", torch.float16, "cuda", "backward", "no backward"),
        ("sparse24-int4", torch.float16, "cuda", "forward", "no sparse24 decoder"),
        ("int4", torch.float64, "cuda", "forward", "activations are float64"),
        ("fp32", torch.float16, "cuda", "forward", "would be rounded"),
        ("int4", torch.float16, "cpu", "forward", "tensors are on cpu, not on a CUDA device"),
    ],
)
def test_what_it_cannot_do_it_says(name, dtype, device, direction, reason):
    assert reason in backend.unsupported(parse_format(name), (8, 64), dtype, torch.device(device), direction)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_against_the_unpacked_weight(case):
    packed, x, bias = problem(case, "cuda")
    assert backend.unsupported(packed.format, packed.shape, x.dtype, x.device, "forward") is None
    assert error_of(run(packed, x, bias), x, packed, bias) == ""


if __name__ == "__main__":
    print(json.dumps(interpret()))
