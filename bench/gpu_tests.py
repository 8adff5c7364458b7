"""Which tests need the device, chosen as pytest collects them: `pytest -p bench.gpu_tests`.

`--on-device` keeps the tests that take a fixture of the device, or are marked `gpu`. `--shard I/N`
keeps what process I of N tests: a test with all its parameters stays in one process, and the tests
of most parameters, which take longest, come first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

FIXTURES = {"device", "backend", "triton_backend", "guarded", "way"}


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--on-device", action="store_true", help="tests that use the device alone")
    parser.addoption("--shard", default="0/1", help="I/N: what process I of N tests")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    kept = [i for i in items if on_device(i)] if config.getoption("--on-device") else items
    i, n = map(int, config.getoption("--shard").split("/"))
    functions = Counter(function(item) for item in kept)
    mine = {name: turn for turn, name in enumerate(shards(functions, n)[i])}
    chosen = sorted((t for t in kept if function(t) in mine), key=lambda t: mine[function(t)])
    left = {*map(id, items)} - {*map(id, chosen)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left])
    items[:] = chosen


def on_device(item: Any) -> bool:
    """Whether a test uses the device, by its fixtures or its mark."""
    return bool(FIXTURES & {*item.fixturenames} or item.get_closest_marker("gpu"))


def function(item: Any) -> str:
    return str(item.nodeid).partition("[")[0]


def shards(sizes: Counter[str], n: int) -> Sequence[list[str]]:
    """The names in ``n`` lists of about equal sizes, the largest first in each."""
    lists: list[list[str]] = [[] for _ in range(n)]
    totals = [0] * n
    for name, size in sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0])):
        least = totals.index(min(totals))
        lists[least].append(name)
        totals[least] += size
    return lists
