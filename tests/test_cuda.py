"""The CUDA int4 kernel: its own source on the emulator against the unpacked weight, and what nvcc makes of it.

As a program (`python -m tests.test_cuda LIBRARY`) it runs the emulated kernel on buffers that end where unreadable
memory begins, so that one byte read too far ends the process.
"""

import ctypes
import mmap
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctp_kernels import CTPError, PackedWeight, _build, pack, parse_format
from ctp_kernels.backends import c_interface, cuda

ROOT = Path(__file__).parents[1]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDOFF = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}

#: hazard: format, (N, K), M, activations
CASES = {
    "m1_vectors": ("int4", (16, 1024), 1, "bf16"),
    "m1_some_lanes_idle": ("int4", (9, 1312), 1, "fp16"),
    "m3_one_row_of_the_tile_empty": ("int4", (8, 256), 3, "fp16"),
    "m8_full_tile": ("int4-asym", (8, 512), 8, "bf16"),
    "m9_second_tile": ("int4", (6, 256), 9, "fp32"),
    "m21_ragged_everything": ("int4-asym", (11, 203), 21, "fp16"),
    "n1": ("int4", (1, 128), 2, "bf16"),
    "k_below_one_word": ("int4", (4, 5), 2, "fp32"),
    "k250_codes_pad_to_a_vector": ("int4-g32", (5, 250), 5, "bf16"),
    "k172_rows_off_16_bytes": ("int4", (10, 172), 4, "fp16"),
    "k200_codes_off_16_bytes_x_on_them": ("int4-row", (10, 200), 4, "fp16"),
    "group8": ("int4-g8-asym", (5, 320), 2, "bf16"),
    "group24_across_vectors": ("int4-g24", (5, 320), 2, "fp32"),
    "group_longer_than_k": ("int4-g512", (5, 320), 1, "fp16"),
    "row_scale": ("int4-row", (7, 1056), 1, "bf16"),
    "row_scale_ragged_asym": ("int4-row-asym", (7, 171), 6, "fp16"),
}


def problem(name, shape, m, dtype, device="cpu"):
    torch.manual_seed(0)
    packed = pack(torch.randn(shape), name).to(device)
    return packed, torch.randn(m, shape[1]).to(device, dtype), torch.randn(shape[0]).to(device, dtype)


def assert_right(y, x, packed: PackedWeight, bias=None):
    """One rounding of the result, and at most K roundings of fp32 on the way."""
    weight = packed.unpack(torch.float64)
    exact = torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    slack = (packed.shape[1] + 2) * 2**-24 * (x.double().abs() @ weight.abs().T + 1)
    assert ((y.double() - exact).abs() <= ROUNDOFF[y.dtype] * exact.abs() + slack).all()


def run(library, x, packed, bias=None):
    return cuda.launch(library, x, packed.tensors, packed.format, packed.shape[0], bias, 0)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the CUDA emulator needs g++")
    path = tmp_path_factory.mktemp("emulator") / "libctp_cuda_emulated.so"
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC")
    flags = (*flags, "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")  # misaligned loads end the process
    include = ("-I", str(ROOT / "csrc" / "emulator"), "-x", "c++")
    subprocess.run([compiler, *flags, *include, str(ROOT / "csrc/cuda/matmul.cu"), "-o", str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def library(emulated):
    return cuda.declare(ctypes.CDLL(str(emulated)))


@pytest.mark.parametrize("case", CASES)
def test_emulated_kernel_against_the_unpacked_weight(library, case):
    name, shape, m, dtype = CASES[case]
    packed, x, bias = problem(name, shape, m, DTYPES[dtype])
    assert_right(run(library, x, packed, bias), x, packed, bias)
    assert_right(run(library, x, packed), x, packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name,shape", [("int4", (5, 256)), ("int4-g24-asym", (6, 75)), ("int4-row-asym", (3, 96))])
def test_one_hot_rows_return_the_decoded_weight_bit_for_bit(library, name, shape, dtype):
    packed, _, _ = problem(name, shape, 1, DTYPES[dtype])
    one_hot = torch.eye(shape[1], dtype=DTYPES[dtype])
    assert torch.equal(run(library, one_hot, packed).T, packed.unpack(DTYPES[dtype]))


def test_a_row_of_x_gives_the_same_bits_alone_and_in_a_batch(library):
    packed, x, bias = problem("int4-asym", (9, 416), 11, torch.bfloat16)
    together = run(library, x, packed, bias)
    assert torch.equal(together, torch.cat([run(library, row[None], packed, bias) for row in x]))


@pytest.mark.parametrize("view", ["padded_rows", "transposed", "misaligned", "expanded", "empty"])
def test_strided_activations(library, view):
    packed, _, bias = problem("int4", (6, 256), 1, torch.float16)
    base = torch.randn(6, 2 * 256 + 1, dtype=torch.float16)
    x = {
        "padded_rows": base[:, :256],
        "transposed": base[:, :256].T.contiguous().T,
        "misaligned": base.view(-1)[1 : 1 + 3 * 256].view(3, 256),
        "expanded": base[:1, :256].expand(3, 256),
        "empty": base[:0, :256],
    }[view]
    y = run(library, x, packed, bias)
    assert y.shape == (x.shape[0], 6)
    assert_right(y, x, packed, bias)


def test_padding_beside_the_activations_is_never_multiplied(library):
    packed, _, bias = problem("int4-g32", (5, 250), 1, torch.bfloat16)  # codes and x both allow 16-byte loads
    x = torch.full((9, 256), torch.nan, dtype=torch.bfloat16)
    x[:, :250] = torch.randn(9, 250)
    assert_right(run(library, x[:, :250], packed, bias), x[:, :250], packed, bias)


def test_fp32_scales(library):
    torch.manual_seed(0)
    packed = pack(torch.randn(5, 200) * 1e-6, "int4-g64-asym")
    assert packed.buffers["scales"].dtype == torch.float32
    x = torch.randn(3, 200)
    y = run(library, x, packed)
    weight = packed.unpack(torch.float64)
    assert torch.allclose(y.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-10)


def test_nothing_is_read_beyond_the_buffers(emulated):
    command = [sys.executable, "-m", "tests.test_cuda", str(emulated)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.split() == list(CASES), done.stdout + done.stderr


def test_bad_arguments_are_a_status_not_a_crash(library):
    packed, x, _ = problem("int4", (4, 64), 2, torch.float32)
    y = torch.empty(2, 4)
    codes, scales = packed.tensors
    good = dict(n=4, k=64, pattern=0, values=4, scale_dtype=1, symmetric=1, group=128, stored=codes.data_ptr())
    good["scales"] = scales.data_ptr()

    def status(**changes):
        call = {"x": x.data_ptr(), "m": 2, "dtype": 0} | changes
        weight = c_interface.Weight(**{name: changes.get(name, value) for name, value in good.items()})
        return library.ctp_cuda_int4_matmul(weight, call["x"], 64, call["m"], None, y.data_ptr(), call["dtype"], None)

    assert status() == 0
    assert_right(y, x, packed)
    for bad in (
        *({"pattern": 1}, {"values": 5}, {"n": 0}, {"k": 0}, {"k": 2**31}, {"group": 12}, {"scale_dtype": 2}),
        *({"symmetric": 0}, {"stored": None}, {"scales": None}, {"stored": codes.data_ptr() + 1}),
        *({"m": -1}, {"dtype": 3}, {"x": None}),
    ):
        assert status(**bad) == 1, bad
    assert "misaligned" in cuda._sentence(library, 1)


@pytest.fixture(scope="module")
def compiled():
    """The real library, compiled by nvcc where the installation has not done it yet."""
    try:
        _build.find_compiler("cuda")
    except _build.BuildError as error:
        pytest.skip(str(error))
    return cuda.declare(_build.load("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_library_loads_and_says_why_it_cannot_run(compiled):
    assert re.match(r"no usable GPU: .*(driver|device)", str(cuda.no_device(compiled)))
    packed, x, bias = problem("int4", (4, 64), 2, torch.float32)
    with pytest.raises(CTPError, match=r"CUDA int4 kernel failed: .*(driver|device)"):
        run(compiled, x, packed, bias)


def test_every_architecture_is_in_the_library_and_no_kernel_spills(compiled):
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump beside nvcc or in the triton package")
    command = [cuobjdump, "-res-usage", compiled._name]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    architectures = set(re.findall(r"^arch = sm_(\w+)", report, re.MULTILINE))
    assert architectures == set(_build.CUDA_ARCHITECTURES)
    usage = re.findall(r"Function \S*int4_rows\S*:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    variants = len(DTYPES) * 2 * 3  # two widths of load, three tiles of M
    assert len(usage) == variants * len(architectures)
    assert all(stack == local == "0" and int(registers) <= 128 for registers, stack, local in usage)


def find_cuobjdump() -> str | None:
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        found = shutil.which(str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"))
    return found


@pytest.mark.parametrize(
    "name,dtype,device,direction,reason",
    [
        ("int4", torch.float16, "cpu", "forward", "tensors are on cpu"),
        ("int4", torch.float64, "cuda", "forward", "activations are float64"),
        ("int4", torch.float16, "cuda", "backward", "no backward"),
        ("int3", torch.float16, "cuda", "forward", "dense int4 only, not int3"),
        ("sparse24-int4", torch.float16, "cuda", "forward", "dense int4 only"),
    ],
)
def test_what_it_cannot_do_it_says(name, dtype, device, direction, reason):
    assert reason in cuda.unsupported(parse_format(name), (8, 64), dtype, torch.device(device), direction)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_against_the_unpacked_weight(case):
    name, shape, m, dtype = CASES[case]
    packed, x, bias = problem(name, shape, m, DTYPES[dtype], "cuda")
    assert cuda.unsupported(packed.format, shape, x.dtype, x.device, "forward") is None
    assert_right(cuda.matmul(x, packed.tensors, packed.format, shape[0], bias), x, packed, bias)


def guarded(tensor: torch.Tensor, keep: list) -> torch.Tensor:
    """A copy whose last byte is the last before a page that cannot be read."""
    page = mmap.PAGESIZE
    pages = -(-tensor.nbytes // page)
    region = mmap.mmap(-1, (pages + 1) * page)
    keep.append(region)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(region, dtype=torch.uint8)[pages * page - tensor.nbytes : pages * page]
    return flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def main(path: str) -> None:
    emulated = cuda.declare(ctypes.CDLL(path))
    for case, (name, shape, m, dtype) in CASES.items():
        packed, x, bias = problem(name, shape, m, DTYPES[dtype])
        keep: list = []
        packed.buffers = {key: guarded(tensor, keep) for key, tensor in packed.buffers.items()}
        x, bias = guarded(x, keep), guarded(bias, keep)
        assert_right(run(emulated, x, packed, bias), x, packed, bias)
        print(case, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
