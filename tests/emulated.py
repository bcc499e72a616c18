"""csrc/cuda compiled by g++ against csrc/emulator, once a session; what the tests of CUDA kernels share.

As a program (`python -m tests.emulated LIBRARY COMMAND ...`) it does what may end the process: runs kernels with a bug
that the emulator must catch, or on buffers that end where unreadable memory begins.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

from ctp_kernels import PackedWeight, _build, pack, parse_format
from ctp_kernels.backends import cuda

from .helpers import weight_for

ROOT = Path(__file__).parents[1]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDOFF = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}
BUGS = {"no_barrier": 1, "no_wait": 2, "swap_fragment": 4, "swap_selector": 8, "no_convergence": 16}

#: Every family of kernels, with the variants of groups and zeros that take another path.
FORMATS = (
    *("int4", "int4-g32-asym", "int4-g64", "int4-row-asym", "int3", "int3-asym", "int3-g32", "int2-asym", "int2-g96"),
    *("int8", "int8-g32-asym", "sparse24", "sparse24-int4", "sparse24-int4-asym", "sparse24-int3", "sparse24-int3-row"),
    *("unstructured", "unstructured-int4", "unstructured-int4-asym"),
)

#: hazard: (N, K), M
SHAPES = {
    "m1": ((64, 256), 1),
    "m3_ragged_n": ((41, 384), 3),
    "m8_full": ((64, 128), 8),
    "m9_second_eight": ((16, 128), 9),
    "m16_uneven_warps": ((20, 1408), 16),
    "m17_wide": ((72, 256), 17),
    "m70_second_tile": ((80, 128), 70),
    "k_one_tile": ((5, 128), 2),
    "n1": ((1, 256), 4),
    "long_sum": ((24, 2048), 2),
    "shared_sum": ((70, 1152), 40),
    "shared_sum_backward": ((1100, 128), 3),
}


@cache
def library_path() -> Path:
    """The emulated library; tests that ask for it are skipped where there is no g++."""
    if __name__ == "__main__":
        return Path(sys.argv[1])
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the CUDA emulator needs g++")
    folder = Path(tempfile.mkdtemp(prefix="ctp-emulator-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-DCTP_EMULATOR")
    # Misaligned loads of global memory and shifts by too much end the process.
    flags = (*flags, "-fsanitize=alignment,shift", "-fsanitize-undefined-trap-on-error", "-I", "csrc/emulator")
    sources = [*(p for p in _build.sources("cuda") if p.suffix == ".cu"), ROOT / "csrc/emulator/emulator.cpp"]
    objects = [folder / f"{source.name}.o" for source in sources]

    def compile(source: Path, output: Path) -> None:
        subprocess.run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(output)], cwd=ROOT, check=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile, sources, objects))
    path = folder / "libctp_cuda_emulated.so"
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(path)], check=True)
    return path


@cache
def load() -> ctypes.CDLL:
    library = cuda.declare(ctypes.CDLL(str(library_path())))
    library.ctp_emulator_fma2.restype = library.ctp_emulator_prmt.restype = ctypes.c_uint32
    return library


@cache
def workspace() -> cuda.Workspace:
    return cuda.new_workspace(load(), torch.device("cpu"), 1 << 20)


def problem(name: str, shape: tuple[int, int], m: int, dtype: torch.dtype, direction: str = "forward"):
    """A packed weight, activations (or dy) with m rows, and a bias."""
    format = parse_format(name).with_dtype(dtype)
    packed = pack(weight_for(format, *shape, torch.float32 if format.quantized else dtype), format)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, shape[1 if direction == "forward" else 0], generator=generator).to(dtype)
    return packed, x, torch.randn(shape[0], generator=generator).to(dtype)


def forward(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None, shared: bool = True):
    n = packed.shape[0]
    return cuda.launch(load(), x, packed.tensors, packed.format, n, bias, 0, workspace() if shared else None)


def backward(dy: torch.Tensor, packed: PackedWeight, shared: bool = True) -> torch.Tensor:
    k = packed.shape[1]
    return cuda.launch_t(load(), dy, packed.tensors, packed.format, k, 0, workspace() if shared else None)


def assert_right(y: torch.Tensor, x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None) -> None:
    """One rounding of the result, and at most K roundings of fp32 on the way."""
    weight = packed.unpack(torch.float64)
    exact = torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    slack = (packed.shape[1] + 2) * 2**-24 * (x.double().abs() @ weight.abs().T + 1)
    assert ((y.double() - exact).abs() <= ROUNDOFF[y.dtype] * exact.abs() + slack).all()
    if y.numel() >= 256:
        dense = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
        assert (y.double() - exact).norm() <= 2 * (dense.double() - exact).norm()


def assert_right_t(dx: torch.Tensor, dy: torch.Tensor, packed: PackedWeight) -> None:
    """As a dense layer of that dtype: the weight is rounded to it, the sum is fp32, one rounding of the result."""
    weight = packed.unpack(torch.float64)
    rounded = packed.unpack(dy.dtype).double()
    exact = dy.double() @ rounded
    slack = (packed.shape[0] + 2) * 2**-24 * (dy.double().abs() @ rounded.abs() + 1)
    assert ((dx.double() - exact).abs() <= ROUNDOFF[dx.dtype] * exact.abs() + slack).all()
    if dx.numel() >= 256:
        truth = dy.double() @ weight
        dense = dy @ weight.to(dy.dtype)
        assert (dx.double() - truth).norm() <= 3 * (dense.double() - truth).norm()


def guarded(tensor: torch.Tensor, keep: list) -> torch.Tensor:
    """A copy on 16 bytes whose last byte (of the last 16) is the last before a page that cannot be read."""
    page, nbytes = mmap.PAGESIZE, -(-tensor.nbytes // 16) * 16
    pages = max(1, -(-nbytes // page))
    region = mmap.mmap(-1, (pages + 1) * page)
    keep.append(region)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(region, dtype=torch.uint8)[pages * page - nbytes :][: tensor.nbytes]
    return flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _run_guarded() -> None:
    for name in FORMATS:
        for (n, k), m in (((48, 256), 3), ((16, 384), 18), ((144, 128), 2)):
            for direction, run in (("forward", forward), ("backward", backward)):
                packed, x, _ = problem(name, (n, k), m, torch.float16, direction)
                if cuda.no_kernel(packed.format, (n, k), x.dtype, direction):
                    continue
                keep: list = []
                packed.buffers = {key: guarded(tensor, keep) for key, tensor in packed.buffers.items()}
                if packed.format.pattern == "unstructured":
                    packed._tile_offsets = guarded(packed.tensors[-1], keep)
                run(guarded(x, keep), packed)
        print(name, flush=True)


def _run_bug(name: str, format: str, direction: str, rows: str) -> None:
    load().ctp_emulator_configure(BUGS[name], 0, 4)
    packed, x, _ = problem(format, (256, 512), int(rows), torch.float16, direction)
    forward(x, packed) if direction == "forward" else backward(x, packed)


def _run_copy(early: str) -> None:
    buffer = ctypes.create_string_buffer(2048 + 16)
    aligned = ctypes.addressof(buffer) + -ctypes.addressof(buffer) % 16
    load().ctp_emulator_copy(ctypes.c_void_p(aligned), 16, int(early), ctypes.create_string_buffer(2048))


def _run_overwrite(backwards: str) -> None:
    load().ctp_emulator_configure(0, int(backwards), 4)
    load().ctp_emulator_overwrite(1)
    load().ctp_emulator_overwrite(0)


def _run_diverge(other_barrier: str) -> None:
    load().ctp_emulator_diverge(int(other_barrier))


def in_a_process(*arguments: str) -> subprocess.CompletedProcess:
    """One of the commands below, where the emulator may end the process."""
    command = [sys.executable, "-m", "tests.emulated", str(library_path()), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    commands = {"guarded": _run_guarded, "bug": _run_bug, "copy": _run_copy}
    commands |= {"overwrite": _run_overwrite, "diverge": _run_diverge}
    commands[sys.argv[2]](*sys.argv[3:])
