"""What the compiler makes of the Triton kernels, ahead of time, for GPUs that need not be there.

`python -m tests.triton_static` compiles every case and writes the figures to triton_static.json, with which
test_triton_compile.py compares: a change of code, of a plan or of Triton shows as a change of that file.
`python -m tests.triton_static bf16 90` compiles every kernel that the rule can choose there and names the faulty ones.
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

from ctp_kernels import FORMATS as TABLE
from ctp_kernels import Format, parse_format
from ctp_kernels.backends.triton import kernels
from ctp_kernels.backends.triton.launch import constants_of, options_of
from ctp_kernels.backends.triton.plan import Plan, dense_plan, plan_for

FIGURES = Path(__file__).with_suffix(".json")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHAPE = (4096, 4096)
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8"}


def plan_of(format: Format, dtype: torch.dtype, m: int, direction: str) -> Plan:
    """m is a row class; direction "forward", "backward" or "dequantize"."""
    if direction == "dequantize":
        return dense_plan(format)
    return plan_for(format, dtype, m, SHAPE, direction)


def share_of_a_thread(format: Format, plan: Plan) -> int:
    """Bits of a tile's first plane that fall on a thread."""
    width = 2 if format.values == "int3" else format.bits
    slots = plan.block_n * plan.block_k // (2 if format.pattern == "sparse24" else 1)
    return slots * width // (32 * plan.warps)


def compile_case(format: Format, dtype: torch.dtype, m: int, direction: str, capability: int, plan: Plan | None = None):
    """The kernel that `launch` starts for 16-byte aligned tensors."""
    plan = plan or plan_of(format, dtype, m, direction)
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


def _cuobjdump(compiled, *options: str) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([program, *options, file.name], capture_output=True, text=True, check=True).stdout


def _main_loop(machine_code: str) -> list[str]:
    """The instructions between the backward jump that spans most and its target; all, where nothing jumps back."""
    found = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", machine_code)]
    longest = [text for at, text in found]
    loops = []
    for at, text in found:
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            loops.append([text for where, text in found if int(jump[1], 16) <= where <= at])
    return max(loops, key=len, default=longest)


def weight_load_bits(ttgir: str) -> int:
    """The widest piece of a row of the weight that a thread loads at a time: the tiles of x lie the other way."""
    layouts = {
        name: int(along)
        for name, along in re.findall(r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[\d+, (\d+)\]", ttgir)
    }
    widths = [0]
    for line in re.findall(r".*(?:tt\.load|async_copy_global_to_local).*", ttgir):
        found = re.search(r"tensor<\d+x(\d+)x!tt\.ptr<[a-z]+(\d+)>, (#\w+)>", line)
        if found and found[3] in layouts:
            widths.append(int(found[2]) * min(int(found[1]), layouts[found[3]]))
    return max(widths)


def figures(compiled) -> dict[str, int]:
    """Registers, memory, and what stands in the main loop of the machine code."""
    report = _cuobjdump(compiled, "-res-usage")
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    loop = _main_loop(_cuobjdump(compiled, "-sass"))

    def count(pattern: str) -> int:
        return sum(re.search(pattern, text) is not None for text in loop)

    return {
        "weight_load_bits": weight_load_bits(compiled.asm["ttgir"]),
        "registers": used["REG"],
        "local_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "loop": len(loop),
        "mma": count(r"\bHMMA"),
        "wgmma": count(r"\bHGMMA"),
        "tcgen05": len(re.findall(r"tcgen05\.mma", compiled.asm["ptx"])),
        "loads_128_bit": count(r"\b(LDG|LDGSTS)\S*\.128"),
        "loads_narrower": count(r"\b(LDG|LDGSTS)\b(?!\S*\.128)"),
        "shared_stores": count(r"\b(STS|STSM)\b"),
        "shared_loads": count(r"\b(LDS|LDSM)\b"),
        "conversions": count(r"\b(I2F|F2I)"),
        "shuffles": count(r"\bSHFL"),
        "barriers": count(r"\bBAR\b"),
    }


#: Formats of each kind, bf16 activations: (GPU, row classes forward, backward).
FORMATS = ("int4", "int4-asym", "int3", "int2", "int8", "bf16", "sparse24-int4", "sparse24-int3-asym", "sparse24-bf16",
           "unstructured-int4", "unstructured-int3-asym", "unstructured-bf16")  # fmt: skip
FEW = ("int4", "sparse24-int4", "unstructured-int4")


def cases() -> list[tuple[str, str, int, str, int]]:
    """(format, activations, rows, direction, GPU): the row classes that get tiles of their own."""
    found = []
    for name in FORMATS:
        wide = name in FEW
        for gpu, forward, backward in (
            (90, (1, 2, 16, 32, 64) if wide else (1, 16, 64), (16, 32, 64) if wide else (16, 64)),
            (80, (1, 2, 16, 64) if wide else (1, 16), (16,)),
            (89, (64,) if wide or name in ("int8", "sparse24-bf16") else (), ()),
            (100, (1, 16, 64) if wide else (), (16,) if wide else ()),
        ):
            found += [(name, "bf16", m, "forward", gpu) for m in forward]
            found += [(name, "bf16", m, "backward", gpu) for m in backward]
        found.append((name, "bf16", 1024, "dequantize", 80))
    found.append(("sparse24-int2", "bf16", 2, "forward", 90))
    found.append(("sparse24-int8", "bf16", 16, "forward", 80))
    for name in ("int4-asym", "unstructured-int3-asym", "fp16", "int3-g8"):
        found += [(name, "fp16", 16, direction, 90) for direction in ("forward", "backward")]
    found += [(name, "fp32", 1, "forward", 80) for name in ("int4-asym", "sparse24-int4", "unstructured-fp32")]
    return [case for case in found if _has_tiles(case)]


def _has_tiles(case: tuple[str, str, int, str, int]) -> bool:
    """Whether the rule does not leave the case to the dense product."""
    name, dtype, m, direction, _ = case
    return direction == "dequantize" or plan_of(parse_format(name), DTYPES[dtype], m, direction).kind != "dense"


def every_case(dtype: str, gpu: int) -> list[tuple[str, str, int, str, int]]:
    """Every format, symmetric and not, at every row class that gets tiles of its own, for one kind of activations."""
    names = [name for name, format in TABLE.items() if format.quantized or format.values == dtype]
    names += [f"{name}-asym" for name in names if parse_format(name).quantized]
    rows = {"forward": (1, 2, 16, 32, 64), "backward": (16, 32, 64), "dequantize": (1024,)}
    found = [(name, dtype, m, way, gpu) for name in names for way, counts in rows.items() for m in counts]
    return [case for case in found if _has_tiles(case)]


def label(case: tuple[str, str, int, str, int]) -> str:
    name, dtype, m, direction, gpu = case
    return f"sm_{gpu} {name} {dtype} {direction} {m}"


def measure(case: tuple[str, str, int, str, int]) -> dict[str, int]:
    name, dtype, m, direction, gpu = case
    return figures(compile_case(parse_format(name), DTYPES[dtype], m, direction, gpu))


def read() -> tuple[str, dict[str, dict[str, int]]]:
    """The version of Triton that the committed figures are of, and they."""
    data = json.loads(FIGURES.read_text())
    names = data["figures"]
    return data["triton"], {name: dict(zip(names, row, strict=True)) for name, row in data["kernels"].items()}


def sweep(dtype: str, gpu: int) -> None:
    """Name each kernel that spills, or does not use the tensor cores where it should (minutes)."""
    found = every_case(dtype, gpu)
    for case in found:
        _, _, m, direction, _ = case
        kernel = measure(case)
        tiles = dtype != "fp32" and (direction == "backward" or (direction == "forward" and m > 2))
        fits = kernel["local_bytes"] == 0 and kernel["shared_bytes"] <= SHARED_MEMORY[gpu]
        if not fits or (tiles and not kernel["mma"] + kernel["wgmma"] + kernel["tcgen05"]):
            print(label(case), kernel, flush=True)
    print(f"{len(found)} kernels compiled")


def main() -> None:
    if len(sys.argv) == 3:
        return sweep(sys.argv[1], int(sys.argv[2]))
    kernels = {}
    for case in cases():
        kernels[label(case)] = measure(case)
        print(label(case), kernels[label(case)], file=sys.stderr, flush=True)
    names = list(next(iter(kernels.values())))
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(list(row.values()))}" for name, row in kernels.items())
    FIGURES.write_text(
        f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "figures": {json.dumps(names)},\n'
        f'  "kernels": {{\n{rows}\n  }}\n}}\n'
    )


if __name__ == "__main__":
    main()
