"""The `--benchmark` flag: without it the items under bench/ are skipped, with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ctp")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks under bench/")
    group.addoption("--benchmark-full", action="store_true", help="run every benchmark, not the ten-minute selection")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    wanted = config.getoption("--benchmark") or config.getoption("--benchmark-full")
    if wanted and not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('--benchmark needs pytest-benchmark: pip install -e ".[bench]"')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--benchmark") or config.getoption("--benchmark-full"):
        return
    for item in items:
        if BENCH in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="a benchmark: run pytest bench/ --benchmark"))
