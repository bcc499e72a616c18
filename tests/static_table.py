"""Registers and shared memory of every kernel of libctp_cuda, for csrc/cuda/static.json.

python -m tests.static_table     compiles the library if need be and writes the table
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

from ctp_kernels import _build

TABLE = Path(__file__).parents[1] / "csrc/cuda/static.json"


def find_cuobjdump() -> str | None:
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin:
        found = shutil.which(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return found


def nvcc_version() -> str:
    output = subprocess.run([_build.find_compiler("cuda"), "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"release ([\d.]+)", output.stdout)
    assert match
    return match[1]


def readable(mangled: str) -> str:
    """`matmul dense int4 fp16, rows of x 8` for a mangled name."""
    dtype = "fp16" if "6__half" in mangled else "bf16"
    match = re.search(
        r"ctp(?:6matmul|8matmul_t|10matmul_few)I.*?(Dense|Sparse24|Unstructured)(Tile|Span)INS_\d(Int\d|Float)", mangled
    )
    numbers = [int(n) for n in re.findall(r"Li(\d+)E", mangled)]
    assert match, mangled
    pattern, form, values = match.groups()
    name = f"{pattern.lower()} {values.lower()} {dtype}"
    if form == "Span":
        return f"matmul_t {name}, rows of dy {8 * numbers[-1]}"
    small = ", groups below 128" if pattern == "Dense" and numbers[0] == 4 else ""
    kernel = "matmul_few" if "matmul_few" in mangled else "matmul"
    return f"{kernel} {name}{small}, rows of x {8 * numbers[-1]}"


def _report(cuobjdump: str, library: Path) -> list[tuple[str, str, int]]:
    """(architecture, mangled name, registers) of every kernel."""
    command = [cuobjdump, "-res-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, architecture = [], ""
    for match in re.finditer(r"^arch = sm_(\w+)|Function (\S+):\s+REG:(\d+)", text, re.MULTILINE):
        if match[1]:
            architecture = match[1]
        else:
            found.append((architecture, match[2], int(match[3])))
    return found


def mangled(cuobjdump: str, library: Path) -> dict[str, str]:
    """Readable name -> mangled name."""
    names = {name for _, name, _ in _report(cuobjdump, library)}
    table = {readable(name): name for name in names}
    assert len(table) == len(names), "two kernels share a readable name"
    return table


def shared_bytes(kernel: str) -> int:
    """The most shared memory that a launch asks for, as FewShape, MatmulShape and MatmulTShape compute it."""
    match = re.search(r"(matmul_few|matmul_t|matmul) (\w+) (\w+) .*rows of d?[xy] (\d+)", kernel)
    assert match
    name, pattern, values, rows = match.groups()
    row_bytes = int(rows) * 256
    if name == "matmul_few":
        small = pattern == "dense" and values != "int8" and "below" not in kernel
        return (8 if small else 4) * (4 if small and rows == "8" else 3) * row_bytes
    if name == "matmul_t":
        return 3 * row_bytes
    # What Packed brings of a row for a lane: a span of 32 inputs, and words of the mask, an offset, a scale and a zero.
    span = {"int2": 8, "int3": 12, "int4": 16, "int8": 32, "float": 64}[values]
    span = {"dense": span, "sparse24": 8 if values == "int3" else span // 2, "unstructured": 0}[pattern]
    words = (pattern != "dense") + (pattern == "unstructured") + 2 * (values != "float")
    slot = 16 * (16 if values == "float" else 4) + 16 if pattern == "unstructured" else 0
    return 3 * (row_bytes + 4 * (2 * 32 * (span + 4 * words) + 16 * slot))


def usage(cuobjdump: str, library: Path) -> dict[str, dict[str, list[int]]]:
    """Readable name -> architecture -> [registers a thread, bytes of shared memory a block]."""
    table: dict[str, dict[str, list[int]]] = {}
    for architecture, name, registers in _report(cuobjdump, library):
        kernel = readable(name)
        table.setdefault(kernel, {})[architecture] = [registers, shared_bytes(kernel)]
    return {kernel: dict(sorted(table[kernel].items())) for kernel in sorted(table)}


def main() -> None:
    cuobjdump = find_cuobjdump()
    assert cuobjdump, "no cuobjdump beside nvcc or in the triton package"
    kernels = usage(cuobjdump, Path(_build.load("cuda")._name))
    lines = ",\n".join(f"    {json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in kernels.items())
    head = '  "columns": "architecture: [registers a thread, bytes of shared memory a block]",\n'
    TABLE.write_text(f'{{\n  "nvcc": "{nvcc_version()}",\n{head}  "kernels": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    main()
