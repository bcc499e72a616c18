"""Compile csrc/ into libctp_cpu and libctp_cuda, and load them.

setup.py compiles at install time; `load` compiles on first use where a library is missing or was built from other
sources. A library carries the CRC-32 of its sources and flags (`ctp_<name>_abi()`), and one with another number is
never called. This file imports nothing of the package, so that setup.py can use it without torch.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger("ctp_kernels")

PACKAGE = Path(__file__).resolve().parent
LIBRARIES = PACKAGE / "lib"

# No -ffast-math and no -march=native: IEEE semantics, and one build for every x86-64 machine.
CPU_FLAGS = (
    *("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off"),
    # GCC 12 takes the undefined merge operands in its own AVX-512 headers for uninitialized variables.
    *("-fopenmp", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
# `make sanitize`: AddressSanitizer and UndefinedBehaviorSanitizer, in a library of its own.
SANITIZE = bool(os.environ.get("CTP_SANITIZE"))
if SANITIZE:
    # -O1: at -O2 GCC 12 takes longer over one AVX-512 unit than the tests take (it had not ended after nine minutes).
    CPU_FLAGS += ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi", "-mbmi2")
ISA_FLAGS = {
    "baseline": (),
    "avx2": AVX2_FLAGS,
    "avx512": (*AVX2_FLAGS, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi", "vbmi2", "vnni"))),
}
CUDA_ARCHITECTURES = ("80", "86", "89", "90a")
CUDA_FLAGS = (
    *("-O3", "-std=c++17", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES),
)


class BuildError(RuntimeError):
    """One sentence: why a library is not there and what to do."""


class Step(NamedTuple):
    """One command that makes `output` from `inputs`."""

    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path


def sources(name: str) -> list[Path]:
    """Every file that libctp_<name> is made of; in a wheel they lie inside the package."""
    root = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"
    suffixes = {".h", ".cpp", ".cuh", ".cu"}
    return [root / "ctp.h", *sorted(p for p in (root / name).glob("*") if p.suffix in suffixes)]


def fingerprint(name: str) -> int:
    """The CRC-32 of the sources and flags of libctp_<name>."""
    crc = zlib.crc32(repr((CPU_FLAGS, ISA_FLAGS) if name == "cpu" else CUDA_FLAGS).encode())
    for path in sources(name):
        crc = zlib.crc32(path.read_bytes(), zlib.crc32(path.name.encode(), crc))
    return crc


def find_compiler(name: str) -> str:
    """The C++ compiler ($CXX, g++, c++, clang++) or nvcc ($CUDA_HOME, the path, /usr/local/cuda).

    Raises BuildError where there is none.
    """
    if name == "cpu":
        candidates = [os.environ.get("CXX"), "g++", "c++", "clang++"]
        missing = "no C++ compiler was found: install g++ (or set CXX)"
    else:
        home = os.environ.get("CUDA_HOME")
        candidates = [f"{home}/bin/nvcc" if home else None, "nvcc", "/usr/local/cuda/bin/nvcc"]
        missing = "nvcc was not found: install the CUDA toolkit (or set CUDA_HOME)"
    for candidate in candidates:
        if candidate and (path := shutil.which(candidate)):
            return path
    raise BuildError(f"libctp_{name} is not built, and {missing}")


def build(name: str, folder: Path, objects: Path) -> Path:
    """Compile libctp_<name>.so into `folder`, with objects and the ninja file in `objects`; the path of the library.

    The library appears by a rename, so that a process never loads half of one. What the compiler warned of lies beside
    it, in libctp_<name>.warnings. Raises BuildError.
    """
    if sys.platform != "linux":
        raise BuildError(f"libctp_{name} is built on Linux only")
    steps = _cpu_steps(objects) if name == "cpu" else _cuda_steps(objects)
    objects.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    said = _run(steps, objects)
    warnings = "".join(f"{line}\n" for line in said.splitlines() if re.search(r"\bwarning ?[:#]", line))
    (folder / f"libctp_{name}.warnings").write_text(warnings, encoding="utf-8")
    target = folder / f"libctp_{name}.so"
    staged = folder / f".libctp_{name}.{os.getpid()}.tmp"
    shutil.copyfile(steps[-1].output, staged)
    staged.replace(target)
    return target


def _cpu_steps(objects: Path) -> list[Step]:
    """One object for the dispatcher and one for each instruction set, and the link.

    libgomp stays unlinked under GCC: torch has loaded its own, and the kernels then run on torch's threads.
    """
    compiler, files = find_compiler("cpu"), tuple(sources("cpu"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    by_name = {path.name: path for path in files}
    flags = (*CPU_FLAGS, f"-DCTP_ABI={fingerprint('cpu')}u")
    units: list[tuple[str, Path, tuple[str, ...]]] = [("dispatch", by_name["dispatch.cpp"], ())]
    for isa, isa_flags in ISA_FLAGS.items():
        if isa == "baseline" or platform.machine() in ("x86_64", "AMD64"):
            units.append((f"matmul_{isa}", by_name["matmul.cpp"], (*isa_flags, f"-DCTP_ISA={isa}")))
    steps = []
    for stem, source, extra in units:
        output = objects / f"{stem}.o"
        steps.append(Step((compiler, *flags, *extra, "-c", str(source), "-o", str(output)), files, output))
    made = tuple(step.output for step in steps)
    sanitizers = tuple(flag for flag in CPU_FLAGS if flag.startswith("-fsanitize"))
    link = (compiler, "-shared", *sanitizers, *map(str, made), *(("-fopenmp",) if "clang" in version else ()))
    return [*steps, _link(link, made, objects / "libctp_cpu.so")]


def _cuda_steps(objects: Path) -> list[Step]:
    files = tuple(sources("cuda"))
    compiler = find_compiler("cuda")
    flags = (*CUDA_FLAGS, f"-DCTP_ABI={fingerprint('cuda')}u")
    steps = []
    for source in files:
        if source.suffix == ".cu":
            output = objects / f"{source.stem}.cu.o"
            steps.append(Step((compiler, *flags, "-c", str(source), "-o", str(output)), files, output))
    made = tuple(step.output for step in steps)
    return [*steps, _link((compiler, "-shared", *CUDA_FLAGS, *map(str, made)), made, objects / "libctp_cuda.so")]


def _link(command: tuple[str, ...], inputs: tuple[Path, ...], output: Path) -> Step:
    return Step((*command, "-o", str(output)), inputs, output)


def _run(steps: list[Step], folder: Path) -> str:
    """Through ninja (only what changed, in parallel), or all of it where ninja is not installed; what they said."""
    ninja = shutil.which("ninja")
    if ninja:
        lines = ["rule run", "  command = $command", "  description = $out", ""]
        for step in steps:
            inputs = " ".join(_escape(path) for path in step.inputs)
            lines += [f"build {_escape(step.output)}: run {inputs}"]
            lines += [f"  command = {shlex.join(step.command).replace('$', '$$')}", ""]
        (folder / "build.ninja").write_text("\n".join(lines), encoding="utf-8")
        return _call((ninja, "-C", str(folder)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = list(pool.map(lambda step: _call(step.command), steps[:-1]))
    return "".join([*said, _call(steps[-1].command)])


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _call(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        raise BuildError(f"{Path(command[0]).name} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout + done.stderr


def load(name: str) -> ctypes.CDLL:
    """libctp_<name>, compiled first where it is missing or stale. Raises BuildError."""
    cached = Path(os.path.expanduser("~")) / ".cache" / "ctp_kernels" / f"{fingerprint(name):08x}"
    stale = None
    for folder in (cached,) if SANITIZE else (LIBRARIES, cached):
        path = folder / f"libctp_{name}.so"
        if path.exists():
            library = _open(path, name)
            if library is not None:
                return library
            stale = path
    try:
        return _compile(name, cached if SANITIZE or not _writable(LIBRARIES) else LIBRARIES)
    except BuildError as error:
        if stale is None:
            raise
        raise BuildError(f"{stale} was built from other sources and cannot be renewed: {error}") from error


def _open(path: Path, name: str) -> ctypes.CDLL | None:
    """The library, or None where it was built from other sources. Raises BuildError where it cannot be loaded."""
    try:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            if "GOMP_" not in str(error) and "omp_" not in str(error):
                raise
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)  # this torch keeps its OpenMP to itself
            library = ctypes.CDLL(str(path))
        abi = getattr(library, f"ctp_{name}_abi")
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
    abi.restype = ctypes.c_uint32
    if abi() == fingerprint(name):
        return library
    _ctypes.dlclose(library._handle)  # or its successor at the same path could not be opened in this process
    return None


def _compile(name: str, folder: Path) -> ctypes.CDLL:
    compiler = find_compiler(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder), tempfile.TemporaryDirectory() as objects:
            path = folder / f"libctp_{name}.so"
            library = _open(path, name) if path.exists() else None  # another process may have been first
            if library is None:
                logger.warning("compiling libctp_%s with %s into %s (once)", name, compiler, folder)
                library = _open(build(name, folder, Path(objects)), name)
    except OSError as error:
        raise BuildError(f"cannot write libctp_{name} into {folder}: {error.strerror or error}") from error
    if library is None:
        raise BuildError(f"the sources of libctp_{name} changed while it was compiled: try again")
    return library


def _writable(folder: Path) -> bool:
    return os.access(folder if folder.exists() else folder.parent, os.W_OK)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """An exclusive lock on a folder, released when the block or the process ends."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def build_all(package: Path, objects: Path, names: Sequence[str] = ("cpu", "cuda")) -> None:
    """Build the libraries into `package`/lib, and print for each where it is or why it is not."""
    for name in names:
        try:
            print(f"ctp-kernels: built {build(name, package / 'lib', objects / name)}")
        except BuildError as error:
            print(f"ctp-kernels: {error}")


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["cpu", "cuda"]
    if not {*wanted} <= {"cpu", "cuda"}:
        sys.exit("usage: python -m ctp_kernels._build [cpu] [cuda]")
    build_all(PACKAGE, PACKAGE.parent / "build" / "kernels", wanted)
