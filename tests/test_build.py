"""Building and loading the libraries: the wheel, a machine without a compiler, stale libraries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ctp_kernels import CTPError, _build, parse_format
from ctp_kernels.backends import choose, cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Libraries are looked for in a folder of this test alone, which is returned."""
    monkeypatch.setattr(_build, "LIBRARIES", tmp_path / "lib")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "lib").mkdir()
    return tmp_path / "lib"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))


def stale_library(folder: Path) -> Path:
    """A library that answers with another number than the sources have."""
    try:
        compiler = _build.find_compiler("cpu")
    except _build.BuildError as error:
        pytest.skip(str(error))
    source, library = folder / "stale.cpp", folder / "libctp_cpu.so"
    number = _build.fingerprint("cpu") ^ 1
    source.write_text(f'extern "C" unsigned ctp_cpu_abi() {{ return {number}u; }}\n')
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


def test_loaded_library_is_of_these_sources() -> None:
    if cpu.available() is not None:
        pytest.skip(str(cpu.available()))
    assert cpu._loaded().ctp_cpu_abi() == _build.fingerprint("cpu")


def test_fingerprint_changes_with_a_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = _build.fingerprint("cpu")
    monkeypatch.setattr(_build, "PACKAGE", tmp_path)
    assert _build.fingerprint("cpu") == before
    with (tmp_path / "csrc" / "cpu" / "simd.h").open("a") as file:
        file.write("// another line\n")
    assert _build.fingerprint("cpu") != before


@pytest.mark.usefixtures("no_compiler")
def test_no_compiler_is_said_in_one_sentence(elsewhere: Path) -> None:
    cpu._library.cache_clear()
    choose.cache_clear()
    try:
        reason = cpu.unsupported(parse_format("int4"), (8, 64), torch.float32, torch.device("cpu"), "forward")
        assert reason == "libctp_cpu is not built, and no C++ compiler was found: install g++ (or set CXX)"
        assert choose(parse_format("int4"), (8, 64), torch.float32, "cpu", "forward").backend == "reference"
        with pytest.raises(CTPError, match="install g\\+\\+"):
            cpu.matmul(torch.ones(1, 64), [], parse_format("int4"), 8, None)
    finally:
        cpu._library.cache_clear()
        choose.cache_clear()


def test_stale_library_is_refused(elsewhere: Path, request: pytest.FixtureRequest) -> None:
    stale_library(elsewhere)
    request.getfixturevalue("no_compiler")
    with pytest.raises(_build.BuildError, match="was built from other sources"):
        _build.load("cpu")


def test_stale_library_is_renewed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.available() is not None:
        pytest.skip(str(cpu.available()))
    fresh = cpu._loaded()._name
    stale = stale_library(request.getfixturevalue("elsewhere"))

    def build(name: str, folder: Path, objects: Path) -> Path:
        shutil.copyfile(fresh, folder / "new")
        return (folder / "new").replace(folder / f"libctp_{name}.so")

    monkeypatch.setattr(_build, "build", build)
    assert _build.load("cpu").ctp_cpu_abi() == _build.fingerprint("cpu")
    assert stale.read_bytes() == Path(fresh).read_bytes()


def test_damaged_library_is_refused(elsewhere: Path) -> None:
    (elsewhere / "libctp_cpu.so").write_bytes(b"\x7fELF damaged")
    with pytest.raises(_build.BuildError, match="cannot be loaded"):
        _build.load("cpu")


def test_failing_compiler_is_quoted(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'no space left in this test' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(_build.BuildError, match="no space left in this test"):
        _build.load("cpu")
    assert not (elsewhere / "libctp_cpu.so").exists()


def test_wheel_without_a_compiler(tmp_path: Path) -> None:
    """One wheel for every Python, with the C++ sources inside, even where nothing can be compiled."""
    pytest.importorskip("setuptools", reason="building a wheel without isolation needs setuptools")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("")
    for name in ("csrc", "ctp_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "ctp").mkdir()
    (tmp_path / "ctp" / "__init__.py").write_text("")
    environment = {key: value for key, value in os.environ.items() if key not in ("CXX", "PYTHONPATH")}
    environment |= {"PATH": str(tmp_path / "nothing"), "CUDA_HOME": str(tmp_path / "nothing")}
    command = [sys.executable, "setup.py", "bdist_wheel"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found: install g++" in done.stdout
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith("ctp_kernels-0.1.0-py3-none-linux_")
    inside = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in inside if name.startswith("ctp_kernels/csrc/")}
    wanted = {p.relative_to(ROOT) for name in ("cpu", "cuda") for p in _build.sources(name)}
    assert shipped == {f"ctp_kernels/{path}" for path in wanted}
    assert "ctp_kernels/backends/triton/tuned.json" in inside
