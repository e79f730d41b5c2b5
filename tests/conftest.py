"""How the suite is shared out among pytest-xdist's workers; without `-n` this only orders the tests.

A module's tests stay on one worker, which keeps what they share. Real engines and whole clusters want the cores, so
their modules run one after another on one worker. Separate hosts mostly wait, and share the other with what is small.
The fleet wants the whole machine: it comes when only unit tests are left, which are soon over.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any, Final

import pytest

ENGINES: Final = re.compile(
    r"tests/integration/test_(cluster|edge_(direct|fleet|openai|process))|_vllm|netns/test_(planned_devices|multinode_weights)"
)
ALONE: Final = "tests/netns/test_whole_fleet.py"
STEPS: Final[dict[str, bool]] = {}  # of the fleet, in their order: whether one failed
FIRST: Final = ("engines", "tests/netns", "tests/integration", "tests/chaos", "tests/simulation", "tests/fuzz", ALONE)


def share_of(nodeid: str) -> str:
    """What stays on one worker: a module, all engines, all hosts."""
    module = nodeid.partition("::")[0]
    if module == ALONE:
        return module
    if ENGINES.search(module):
        return "engines"
    return "tests/netns" if module.startswith("tests/netns/") else module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, but for the fleet."""

    def place(item: pytest.Item) -> int:
        share = share_of(item.nodeid)
        if share == ALONE:
            return FIRST.index(ALONE)
        return next((at for at, name in enumerate(FIRST) if share.startswith(name)), len(FIRST))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's own groups (`--dist loadgroup`) have no effect with pytest 9.2: it no longer lets node ids be changed."""
    from xdist.scheduler import LoadScopeScheduling

    class Shares(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return share_of(nodeid)

    return Shares(config, log)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Names what failed at once: the whole suite takes a while, and its dots name nobody."""
    if share_of(report.nodeid) == ALONE:
        STEPS[report.nodeid] = STEPS.get(report.nodeid, False) or report.failed
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        told = f"\n{report.when} of {report.nodeid} failed after {report.duration:.1f} s"
        print(told, file=sys.__stderr__, flush=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Each step of the fleet rests on those before it: where one failed, `--last-failed` means all of them."""
    cache = getattr(session.config, "cache", None)
    if cache is not None and any(STEPS.values()) and "PYTEST_XDIST_WORKER" not in os.environ:
        cache.set("cache/lastfailed", {**cache.get("cache/lastfailed", {}), **dict.fromkeys(STEPS, True)})
