"""What the benchmarks run on: its name, and its two roofs, measured."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from ctp_kernels.backends import cpu

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Machine:
    """name: the processor; threads: torch's; the roofs, measured: gb_per_s by reading 512 MB (GPU: 4 GB), gflop_per_s
    by fp32 multiply-adds in registers (CPU) or an fp16 matmul of 8192 x 8192 x 8192 (GPU)."""

    name: str
    device: str
    threads: int
    gb_per_s: float
    gflop_per_s: float
    torch: str
    python: str

    @property
    def folder(self) -> Path:
        """Where results of this machine go: bench/results/<name>-<threads>t."""
        slug = re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")
        return RESULTS / (slug if self.device == "cuda" else f"{slug}-{self.threads}t")

    def to_dict(self) -> dict:
        return asdict(self)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(call: Callable[[], object], device: str, repeats: int = 5) -> float:
    call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        begun = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


@cache
def cold_bytes() -> int:
    """Bytes of copies of a weight to rotate over, so that none is still in a cache of the CPU: 64 MB, or more than the
    largest cache that Linux names (which a virtual machine may share with others)."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    kilobytes = [int(size.removesuffix("K")) for size in sizes if re.fullmatch(r"\d+K", size)]
    return max([64 * 2**20, *(size * 2**10 * 5 // 4 for size in kilobytes)])


@cache
def machine(device: str) -> Machine:
    """Name the machine and measure its roofs; takes about two seconds on two cores."""
    big = torch.ones((128 if device == "cpu" else 1024) * 2**20, device=device)
    bandwidth = big.nbytes / median_seconds(lambda: big.sum(), device) / 1e9
    if device == "cpu":
        turns = 10_000_000
        flops = cpu.multiply_add(turns) / median_seconds(lambda: cpu.multiply_add(turns), device) / 1e9
    else:
        side = 8192
        a, b = (torch.randn(side, side, device=device, dtype=torch.float16) for _ in range(2))
        flops = 2 * side**3 / median_seconds(lambda: a @ b, device) / 1e9
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return Machine(
        name, device, torch.get_num_threads(), round(bandwidth, 1), round(flops, 1), torch.__version__,
        platform.python_version(),
    )  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        if found:
            name = re.sub(r"\((R|TM)\)", "", found[1]).strip()
            numbers = re.findall(r"(?:cpu family|model)\s*:\s*(\d+)", info.read_text())
            if (
                not re.search(r"\d", name) and len(numbers) >= 2
            ):  # a virtual machine that keeps to itself which one it is
                name += f" family {numbers[0]} model {numbers[1]}"
            return name
    return platform.processor() or platform.machine()
