"""Compile, and on request measure, every kernel that a model's packed layers will launch, before someone waits for it.

Triton compiles a kernel when it is first launched and keeps it on disk; `warm_up` launches each once. With `tune` it
also times other tiles than the rule's (L2-cold, by triton.testing.do_bench) and keeps the best in `tuned.user_file()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ...errors import CTPError
from ...format import Format
from .. import choose, row_class
from . import tuned
from .plan import DENSE_FROM_ROWS, Plan, default_plan, dense_plan

#: Row classes of prompts and batches; the kernels of larger ones are those of the last.
ROWS = (1, 2, 4, 8, 16, 32, 64, DENSE_FROM_ROWS)


@dataclass(frozen=True)
class Weight:
    """A packed weight as a layer launches it, with the bias (or None) that goes with it."""

    format: Format
    shape: tuple[int, int]
    tensors: Sequence[torch.Tensor]
    bias: torch.Tensor | None


def candidates(plan: Plan, format: Format, m: int, direction: str) -> Iterator[Plan]:
    """Plans that differ from `plan` in one thing, and the dense product: what `tune` tries."""
    yield plan
    if plan.kind == "dense":
        return
    least_n = 1 if plan.kind == "decode" else 16
    for factor in (0.25, 0.5, 2, 4):
        splits = int(plan.splits * factor)
        if 1 <= splits <= 32:
            yield replace(plan, splits=splits)
    for block_n in (plan.block_n // 2, plan.block_n * 2):
        if least_n <= block_n <= 256:
            yield replace(plan, block_n=block_n)
    for warps in (plan.warps // 2, plan.warps * 2):
        if 1 <= warps <= 8:
            yield replace(plan, warps=warps)
    for stages in (2, 3, 4, 5):
        if stages != plan.stages and plan.kind == "tile":
            yield replace(plan, stages=stages)
    if direction == "forward" and plan.kind == "tile" and m <= 8:
        yield replace(plan, kind="decode", block_n=4, block_m=m, warps=1, stages=1)
    yield dense_plan(format)


def best(
    plans: Sequence[Plan], run: Callable[[Plan], torch.Tensor], seconds: Callable[[Callable[[], object]], float]
) -> tuple[Plan, float]:
    """The fastest plan whose product is the first one's (up to roundings), and its time.

    One that the GPU cannot take (registers, shared memory) is left out.
    """
    expected = run(plans[0]).float()
    times: dict[Plan, float] = {}
    for plan in plans:
        try:
            got = run(plan).float()
        except _too_large():
            continue
        error = (got - expected).norm() / expected.norm()
        if not error < 2e-2:
            raise CTPError(f"{plan} computes something else than {plans[0]}: relative difference {error:.2e}")
        times[plan] = seconds(lambda plan=plan: run(plan))
    return min(times.items(), key=lambda item: item[1])


def warm_up(
    weights: Sequence[Weight],
    dtype: torch.dtype,
    *,
    rows: Sequence[int] = ROWS,
    directions: Sequence[str] = ("forward", "backward"),
    tune: bool = False,
    seconds: Callable[[Callable[[], object]], float] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> dict:
    """Launch (and tune) every kernel of `weights` for these row counts; returns how many, and the plans that were kept.

    `progress` hears of each launch; `seconds` times a call, by default triton.testing.do_bench.
    """
    from . import launch

    kept: dict[str, dict] = {}
    gpu, multiprocessors = launch.gpu_of(weights[0].tensors[0])
    launches = 0
    for weight in weights:
        (n, k), format = weight.shape, weight.format
        for direction in directions:
            for m in sorted({row_class(count) for count in rows}):
                x = torch.randn(m, k if direction == "forward" else n, device=weight.tensors[0].device).to(dtype)

                def run(plan: Plan | None = None, weight=weight, direction=direction, x=x) -> torch.Tensor:
                    (n, k), format = weight.shape, weight.format
                    if direction == "forward":
                        return launch.matmul(x, weight.tensors, format, n, weight.bias, plan)
                    return launch.matmul_t(x, weight.tensors, format, k, plan)

                if not tune and not _launched(weight, dtype, m, direction):
                    progress(1)
                    continue
                if tune:
                    rule = default_plan(format, dtype, m, weight.shape, direction, multiprocessors)
                    plan, _ = best(list(candidates(rule, format, m, direction)), run, seconds or _bench)
                    kept[tuned.key(format, dtype, m, weight.shape, direction)] = plan.to_dict()
                else:
                    run()
                launches += 1
                progress(1)
    if kept:
        tuned.remember(gpu or "interpreter", kept)
    return {"gpu": gpu, "kernels": launches, "tuned": kept}


def _launched(weight: Weight, dtype: torch.dtype, m: int, direction: str) -> bool:
    """Whether "auto" leaves so many rows to these kernels."""
    if not weight.tensors[0].is_cuda:
        return True  # the interpreter
    return choose(weight.format, weight.shape, dtype, "cuda", direction, rows=m).backend == "triton"


def _bench(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(call, return_mode="median") / 1e3


def _too_large() -> tuple[type[Exception], ...]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompilationError
