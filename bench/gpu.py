"""Timing on a GPU: weights that are not in the L2 cache, launched one by one and inside a CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Calls = Sequence[Callable[[], object]]
Result = TypeVar("Result")


def copies_to_overflow(nbytes: int) -> int:
    """How many copies of a weight together take four times the L2 cache, so that each is read from memory."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, -(-4 * cache // nbytes))


def race(contenders: dict[str, Calls], *, graph: bool, seconds: float = 0.1, least: int = 7) -> dict[str, dict]:
    """Time contenders in turn, so that a change of the clock meets all: {name: {median, low, high}} in seconds a call.

    A round of a contender is one call for each of its copies of the weight. `graph`: the round is captured once and
    replayed, so that the launch from Python costs nothing; otherwise it is launched anew, as eager code does. Rounds
    are repeated until a time is a millisecond at least, after one that is not timed: no launch is waited for.
    """
    rounds = {name: _in_turn(calls) for name, calls in contenders.items()}
    if graph:
        rounds = {name: captured(run)[0] for name, run in rounds.items()}
    for run in rounds.values():
        run()
    repeats = {name: max(1, round(1e-3 / _seconds(run, 1))) for name, run in rounds.items()}
    once = sum(_seconds(run, repeats[name]) for name, run in rounds.items())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(max(least, min(200, int(seconds / max(once, 1e-6))))):
        for name, run in rounds.items():
            times[name].append(_seconds(run, repeats[name]) / repeats[name] / len(contenders[name]))
    found = {}
    for name, measured in times.items():
        fifths = statistics.quantiles(measured, n=5)
        found[name] = {"median": statistics.median(measured), "low": fifths[0], "high": fifths[3]}
    return found


def _in_turn(calls: Calls) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def captured(run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """`run` as a CUDA graph: the call that replays it, and what it returned, which a replay fills anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles, and chooses algorithms
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def _seconds(run: Callable[[], None], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
