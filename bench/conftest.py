"""Fixtures of the bench suite: an interleaving timer, and rows that end up in CSV and pictures."""

from __future__ import annotations

import csv
import io
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bench.machine import machine, synchronize
from bench.plot import plot_all
from ctp_kernels.files import write_json, write_text

Calls = Sequence[Callable[[], object]]


@pytest.fixture
def interleave(benchmark) -> Callable[..., dict[str, dict[str, float]]]:
    """Time contenders in turn, round by round, so that a change of the machine's mood meets all of them.

    Call with `contenders` = {name: [one call per copy of the weight]}; the last one is what pytest-benchmark
    reports, each round times every contender once, on the next copy. Returns {name: {median, low, high}} in seconds
    (low and high: the 20th and 80th percentile).
    """

    def run(contenders: dict[str, Calls], *, device: str = "cpu", seconds: float = 0.6, least: int = 7) -> dict:
        *others, own = contenders
        times: dict[str, list[float]] = {name: [] for name in contenders}
        turn = itertools.count()

        def untimed(name: str, index: int) -> None:
            """On other data: code, but not the weight, is in the caches then, as between two layers of a model."""
            calls = contenders[name]
            calls[(index + len(calls) // 2) % len(calls)]()

        def timed(name: str, index: int) -> None:
            call = contenders[name][index % len(contenders[name])]
            synchronize(device)
            begun = time.perf_counter()
            call()
            synchronize(device)
            times[name].append(time.perf_counter() - begun)

        for index, name in itertools.product(range(2), contenders):  # warm up, and learn how long a round takes
            timed(name, index)
        one_round = sum(min(t) for t in times.values())
        brief = one_round < 0.05  # in a longer call nobody would see the difference
        for t in times.values():
            t.clear()

        def before_round() -> tuple[tuple[int], dict]:
            index = next(turn)
            for name in others:
                if brief:
                    untimed(name, index)
                timed(name, index)
            if brief:
                untimed(own, index)
            return (index,), {}

        rounds = max(least, min(200, int(seconds / max(one_round, 1e-6))))
        benchmark.pedantic(lambda index: timed(own, index), setup=before_round, rounds=rounds, warmup_rounds=0)
        return {name: _summary(t) for name, t in times.items()}

    return run


def _summary(times: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5)
    return {"median": statistics.median(times), "low": fifths[0], "high": fifths[3]}


class Table:
    """Rows of the benchmark files, by device and file; `record`: written to CSV as they come, so that a run that is cut
    off leaves what it measured."""

    def __init__(self, record: bool) -> None:
        self.record = record
        self.rows: dict[tuple[str, str], list[dict]] = {}

    def add(self, device: str, name: str, row: dict) -> None:
        rows = self.rows.setdefault((device, name), [])
        rows.append(row)
        if self.record:
            write_csv(machine(device).folder / f"{name}.csv", rows)


TABLE = pytest.StashKey[Table]()


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    # a filtered run shows its rows, and leaves the record whole
    return request.config.stash.setdefault(TABLE, Table(record=not request.config.getoption("keyword")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the rows, and draw what was recorded. Not in the fixture's teardown, whose output pytest captures."""
    collected = config.stash.get(TABLE, None)
    for (device, name), rows in collected.rows.items() if collected else ():
        where = machine(device)
        roofs = f"{where.gb_per_s} GB/s, {where.gflop_per_s} GFLOP/s"
        for line in ["", f"{name} on {where.name}, {where.threads} threads: roofs {roofs}", *format_rows(rows)]:
            terminalreporter.write_line(line)
    for device in {device for device, _ in collected.rows} if collected and collected.record else ():
        write_json(machine(device).folder / "machine.json", machine(device).to_dict())
        plot_all(machine(device).folder)


def format_rows(rows: list[dict]) -> list[str]:
    columns = list(rows[0])
    cells = [[_cell(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    return ["  ".join(f"{value:>{w}}" for value, w in zip(line, widths, strict=True)) for line in [columns, *cells]]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
