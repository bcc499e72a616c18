"""What the compiler makes of the Triton kernels, ahead of time, for GPUs that need not be there.

`python -m tests.triton_static` compiles every case and writes the figures to triton_static.json, with which
test_triton_compile.py compares: a change of code, of a plan or of Triton shows as a change of that file.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctp_kernels import Format, parse_format
from ctp_kernels.backends.triton import kernels
from ctp_kernels.backends.triton.launch import constants_of, options_of
from ctp_kernels.backends.triton.plan import Plan, dense_plan, plan_for

FIGURES = Path(__file__).with_suffix(".json")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHAPE = (4096, 4096)
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8"}


def compile_case(format: Format, dtype: torch.dtype, m: int, direction: str, capability: int, plan: Plan | None = None):
    """The kernel that `launch` starts for 16-byte aligned tensors, m a row class; direction "dequantize" too."""
    if plan is None:
        plan = dense_plan(format) if direction == "dequantize" else plan_for(format, dtype, m, SHAPE, direction)
    constants = constants_of(plan, format, dtype, SHAPE[1], direction, True)
    number = _POINTERS[dtype]
    stored = "*u8" if format.quantized else _POINTERS[format_dtype(format)]
    weight = {"stored": stored, "stored_hi": "*u8", "mask": "*u8", "row_offsets": "*i32", "tile_offsets": "*i32",
              "scales": "*fp16", "zeros": "*u8"}  # fmt: skip
    sizes = {"M": "i32", "N": "i32"}
    output = number if plan.splits == 1 else "*fp32"
    if direction == "dequantize":
        kernel, signature = kernels.dequantize_kernel, {**weight, "weight": number, "N": "i32"}
    elif direction == "backward":
        kernel, signature = kernels.matmul_t_kernel, {"dy": number, **weight, "dx": output, **sizes, "lddy": "i32"}
    else:
        kernel = kernels.decode_kernel if plan.kind == "decode" else kernels.matmul_kernel
        signature = {"x": number, **weight, "bias": number, "y": output, **sizes, "ldx": "i32"}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(signature) if name != "M"}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options_of(plan))


def format_dtype(format: Format) -> torch.dtype:
    return DTYPES[str(format.values)]


def resources(compiled) -> dict[str, int]:
    """Registers and bytes of stack and local memory of a compiled kernel, from its machine code."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def figures(compiled) -> dict[str, int]:
    """Registers, memory, and how often some instructions stand in the PTX."""
    ptx, used = compiled.asm["ptx"], resources(compiled)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return {
        "registers": used["REG"],
        "local_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "instructions": count(r"(?m)^\t(?!\.|//)[a-z@]"),
        "mma": count(r"\bmma\.sync"),
        "wgmma": count(r"wgmma\.mma_async"),
        "loads_128_bit": count(r"cp\.async\.cg\.shared\.global|ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64"),
        "loads_narrower": count(r"cp\.async\.ca|ld\.global(?!\S*\.v4\.b32)(?!\S*\.v2\.b64)"),
        "shared_stores": count(r"\bst\.shared|stmatrix"),
        "shared_loads": count(r"\bld\.shared|ldmatrix"),
        "shuffles": count(r"\bshfl\."),
        "barriers": count(r"\bbar\.sync"),
    }
