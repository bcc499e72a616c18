"""What nvcc makes of csrc/cuda: no warning, no spill, the instructions that were promised, registers as committed."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from ctp_kernels import _build
from ctp_kernels.backends import cuda

from . import static_table

ROOT = Path(__file__).parents[1]
HALF_TYPES = ("fp16", "bf16")


@cache
def compiled_library() -> ctypes.CDLL:
    """The real library, compiled by nvcc where the installation has not done it yet."""
    try:
        _build.find_compiler("cuda")
    except _build.BuildError as error:
        pytest.skip(str(error))
    return cuda.declare(_build.load("cuda"))


@pytest.fixture(scope="module")
def library() -> Path:
    return Path(compiled_library()._name)


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    found = static_table.find_cuobjdump()
    if found is None:
        pytest.skip("no cuobjdump beside nvcc or in the triton package")
    return found


@pytest.fixture(scope="module")
def usage(library, cuobjdump) -> dict[str, dict[str, list[int]]]:
    return static_table.usage(cuobjdump, library)


def test_no_kernel_spills_on_any_architecture(library, cuobjdump, usage):
    report = subprocess.run([cuobjdump, "-res-usage", str(library)], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^arch = sm_(\w+)", report, re.MULTILINE)) == set(_build.CUDA_ARCHITECTURES)
    assert all(set(by_arch) == set(_build.CUDA_ARCHITECTURES) for by_arch in usage.values())
    functions = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert len(functions) == len(usage) * len(_build.CUDA_ARCHITECTURES)
    assert [name for name, _, stack, local in functions if (stack, local) != ("0", "0")] == []


def test_registers_and_shared_memory_are_as_committed(usage):
    """Regenerate with `python -m tests.static_table`, and say in the commit why it changed."""
    committed = json.loads((ROOT / "csrc/cuda/static.json").read_text())
    if committed["nvcc"] != static_table.nvcc_version():
        pytest.skip(f"the table was made by nvcc {committed['nvcc']}")
    assert usage == committed["kernels"]


def test_no_warnings(library):
    """Of nvcc, for any of the architectures, when this library was built (delete the library to build it again)."""
    assert library.with_suffix(".warnings").read_text() == ""


def test_warnings_are_kept_beside_a_library(tmp_path, monkeypatch):
    script = tmp_path / "loud.sh"
    script.write_text("#!/bin/sh\necho 'a.cu(3): warning #177-D: unused' >&2\ntouch $1\n")
    script.chmod(0o755)
    step = _build.Step((str(script), str(tmp_path / "made")), (), tmp_path / "made")
    monkeypatch.setattr(_build, "_cuda_steps", lambda objects: [step])
    made = _build.build("cuda", tmp_path / "lib", tmp_path)
    assert made.with_suffix(".warnings").read_text() == "a.cu(3): warning #177-D: unused\n"


@cache
def sass(cuobjdump: str, library: Path, kernel: str, architecture: str) -> str:
    """The machine code of the kernel that `static_table.readable` calls so."""
    name = static_table.mangled(cuobjdump, library)[kernel]
    command = [cuobjdump, "-sass", "-arch", f"sm_{architecture}", "-fun", name, str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert name in text
    return text


MMA, SPARSE_MMA, LOAD16 = r"HMMA\.16816\.F32", r"HMMA\.SP\.16832\.F32", r"LDG\.E(\.NA)?\.128"
COPY16, COPY8, READ16, MATRIX = r"LDGSTS\.E\.BYPASS\.128", r"LDGSTS\.E\.64", r"LDS\.128", r"LDSM\.16\.M88\.4"

#: Every lane's codes come as wide as its part of the row is: 16 bytes of int4 and int8, 8 of int3 and int2.
PROMISED = {
    "matmul_few dense int4 {}, rows of x 8": (MMA, LOAD16, COPY16, READ16),
    "matmul dense int4 {}, rows of x 64": (MMA, COPY16, READ16),
    "matmul dense int3 {}, rows of x 32": (MMA, COPY16, COPY8, READ16),
    "matmul dense int8 {}, rows of x 64": (MMA, COPY16, READ16),
    "matmul_few dense int3 {}, rows of x 16": (MMA, r"LDG\.E\.64", COPY16, READ16),
    "matmul sparse24 float {}, rows of x 64": (SPARSE_MMA, COPY16, COPY8, MATRIX, READ16),
    "matmul_few sparse24 int4 {}, rows of x 8": (SPARSE_MMA, LOAD16, COPY8, MATRIX),
    "matmul sparse24 int3 {}, rows of x 64": (SPARSE_MMA, COPY8, MATRIX),
    "matmul unstructured float {}, rows of x 32": (MMA, COPY16, READ16),
    "matmul unstructured int4 {}, rows of x 32": (MMA, COPY16, READ16),
    "matmul_t dense int4 {}, rows of dy 16": (MMA, r"LDG\.E\.64", COPY16, READ16),
    "matmul_t dense int8 {}, rows of dy 32": (MMA, LOAD16, COPY16, READ16),
    "matmul_t sparse24 float {}, rows of dy 32": (MMA, LOAD16, COPY16, READ16),
    "matmul_t unstructured int4 {}, rows of dy 16": (MMA, LOAD16, COPY16, READ16),
}


@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("kernel", PROMISED)
def test_the_promised_instructions_are_there(library, cuobjdump, kernel, architecture):
    """In the main loop, not only somewhere; and there nothing goes to local memory."""
    for dtype in HALF_TYPES:
        text = sass(cuobjdump, library, kernel.format(dtype), architecture)
        loop = main_loop(text)
        for instruction in PROMISED[kernel]:
            assert re.search(instruction, loop), f"{instruction} is not in the main loop of {kernel.format(dtype)}"
        assert not re.search(r"\b(LDL|STL)\b", loop)


def main_loop(text: str) -> str:
    """The instructions between the target and the place of the backward jump that spans the most."""
    code = {int(address, 16): line for address, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^/]*;)", text)}
    jumps = [
        (int(target, 16), address)
        for address, line in code.items()
        for target in re.findall(r"BRA(?:\.\w+)*\s+(?:\S+,\s*)?(?:`\(\S+\)\s*)?0x([0-9a-f]+)", line)
        if int(target, 16) < address
    ]
    assert jumps, "no loop"
    start, stop = max(jumps, key=lambda jump: jump[1] - jump[0])
    return "\n".join(line for address, line in code.items() if start <= address <= stop)
