"""Which replicas are left out as far too slow, and how many at once."""

from __future__ import annotations

from typing import Any

import pytest

from megatoken.router.config import BreakerConfig
from megatoken.router.fleet.outliers import slow_replicas
from tests.support.router_core import CoreFleet

FAST = [1.0] * 9


def slow(steps_s: list[float], steps: list[int] | None = None, kinds: str = "", **settings: Any) -> list[str]:
    fleet = CoreFleet(replicas=0)
    for i, step_s in enumerate(steps_s):
        replica = fleet.add_replica(f"m-{i}", device_kind=kinds[i] if kinds else "")
        replica.step_s = step_s
        replica.steps = steps[i] if steps else 64
    given = {"eject_ratio": 0.25, "max_ejected": 0.5, **settings}
    return [replica.name for replica in slow_replicas(fleet.pool, BreakerConfig(**given), 100.0)]


@pytest.mark.parametrize(
    ("steps_s", "found"),
    [
        ([*FAST, 4.1], ["m-9"]),
        ([*FAST, 4.0], []),
        ([*FAST, 3.9], []),
        ([1.0, 1.0, 1.0, 9.0], ["m-3"]),
        ([1.0, 1.0, 9.0], []),  # too few to tell
        ([9.0, 1.0, 1.0, 1.0, 1.0, 12.0, 1.0], ["m-5", "m-0"]),  # the slowest first
    ],
)
def test_slower_than_the_median_by_the_ratio_is_left_out(steps_s: list[float], found: list[str]) -> None:
    assert slow(steps_s) == found


@pytest.mark.parametrize(("steps", "found"), [(63, []), (64, ["m-4"]), (65, ["m-4"])])
def test_only_those_that_made_enough_steps_are_judged(steps: int, found: list[str]) -> None:
    assert slow([1.0, 1.0, 1.0, 1.0, 9.0], [64, 64, 64, 64, steps]) == found


def test_only_those_that_made_enough_steps_are_compared_with() -> None:
    assert slow([1.0, 1.0, 1.0, 9.0], [64, 64, 63, 64]) == []


@pytest.mark.parametrize(
    ("kinds", "found"), [("aaaaaaaa", ["m-7"]), ("aaaabbbb", ["m-7"]), ("aaaaabbb", []), ("aaaaaaab", [])]
)
def test_each_device_kind_is_compared_with_its_own(kinds: str, found: list[str]) -> None:
    assert slow([1.0] * 7 + [9.0], kinds=kinds) == found


def test_a_kind_too_few_to_tell_does_not_hide_the_next() -> None:
    assert slow([1.0, 9.0, 1.0, 1.0, 1.0, 9.0], kinds="aabbbb") == ["m-5"]


@pytest.mark.parametrize(
    ("share", "found"),
    [(0.0, []), (0.09, []), (0.1, ["m-9"]), (0.19, ["m-9"]), (0.2, ["m-9", "m-8"]), (1.0, ["m-9", "m-8", "m-7"])],
)
def test_a_bounded_share_is_left_out_at_once(share: float, found: list[str]) -> None:
    assert slow([1.0] * 7 + [7.0, 8.0, 9.0], max_ejected=share) == found


@pytest.mark.parametrize(
    ("until_s", "found"),
    [(99.9, ["m-9", "m-8"]), (100.0, ["m-9", "m-8"]), (100.1, ["m-8"])],
)
def test_those_that_are_out_count_towards_the_share_and_are_not_named_again(until_s: float, found: list[str]) -> None:
    fleet = CoreFleet(replicas=10)
    for replica, step_s in zip(fleet.replicas, [1.0] * 8 + [8.0, 9.0], strict=True):
        replica.step_s, replica.steps = step_s, 64
    fleet.replicas[9].ejected_until_s = until_s
    config = BreakerConfig(eject_ratio=0.25, max_ejected=0.2)
    assert [replica.name for replica in slow_replicas(fleet.pool, config, 100.0)] == found


@pytest.mark.parametrize("lost", ["connected", "draining"])
def test_those_that_do_not_serve_are_not_named(lost: str) -> None:
    fleet = CoreFleet(replicas=10)
    for replica, step_s in zip(fleet.replicas, [1.0] * 8 + [8.0, 9.0], strict=True):
        replica.step_s, replica.steps = step_s, 64
    setattr(fleet.replicas[9], lost, lost == "draining")
    found = slow_replicas(fleet.pool, BreakerConfig(eject_ratio=0.25, max_ejected=0.5), 100.0)
    assert [replica.name for replica in found] == ["m-8"]


def test_the_slow_of_every_kind_are_named() -> None:
    assert slow([1.0, 1.0, 1.0, 8.0, 1.0, 1.0, 1.0, 9.0], kinds="aaaabbbb") == ["m-7", "m-3"]


@pytest.mark.parametrize(("already_out", "found"), [(0, ["m-9", "m-8"]), (1, ["m-9"]), (2, []), (3, [])])
def test_each_that_is_out_leaves_room_for_one_fewer(already_out: int, found: list[str]) -> None:
    fleet = CoreFleet(replicas=10)
    for replica, step_s in zip(fleet.replicas, [1.0] * 7 + [7.0, 8.0, 9.0], strict=True):
        replica.step_s, replica.steps = step_s, 64
    for replica in fleet.replicas[:already_out]:
        replica.ejected_until_s = 200.0
    config = BreakerConfig(eject_ratio=0.25, max_ejected=0.2)
    assert [replica.name for replica in slow_replicas(fleet.pool, config, 100.0)] == found
