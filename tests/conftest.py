"""How the suite is shared out among pytest-xdist's workers; without `-n` it only orders the tests.

A module's tests stay on one worker, which keeps what they share. Real engines take all cores, so their tests stay on
one worker as well: beside them run tests that mostly wait. What takes longest comes first.
"""

from __future__ import annotations

import pytest

FIRST = ("engines", "tests/netns", "tests/integration", "tests/chaos", "tests/simulation")


def group_of(item: pytest.Item) -> str:
    """What runs on one worker, in order."""
    if item.get_closest_marker("vllm"):
        return "engines"
    module = item.nodeid.partition("::")[0]
    return "tests/netns" if module.startswith("tests/netns/") else module


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    groups = {item: group_of(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    order = {prefix: place for place, prefix in enumerate(FIRST)}
    items.sort(key=lambda item: next((at for name, at in order.items() if groups[item].startswith(name)), len(FIRST)))
