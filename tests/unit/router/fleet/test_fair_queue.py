"""In which order the queue of a model hands out, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from megatoken.router.fleet.fair_queue import FairQueue


@dataclass(eq=False)
class Item:
    name: str
    cost_tokens: int = 10
    priority: int = 0

    @property
    def tenant(self) -> str:
        return self.name[0]


def order(queue: FairQueue) -> str:
    found = []
    while (item := queue.pop()) is not None:
        found.append(item.name)
    return " ".join(found)


def queue_of(*items: Item) -> FairQueue:
    queue = FairQueue()
    for item in items:
        queue.push(item)
    return queue


def named(names: str, cost_tokens: int = 10, priority: int = 0) -> list[Item]:
    return [Item(name, cost_tokens, priority) for name in names.split()]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (named("a1 a2 a3 b1"), "a1 b1 a2 a3"),
        (named("a1 b1 c1 a2 b2 c2"), "a1 b1 c1 a2 b2 c2"),
        (named("a1 a2", 30) + named("b1 b2 b3 b4"), "a1 b1 b2 b3 a2 b4"),  # of equals the first that came
        (named("a1 a2", 31) + named("b1 b2 b3 b4 b5"), "a1 b1 b2 b3 b4 a2 b5"),
        (named("a1 a2", 29) + named("b1 b2 b3 b4"), "a1 b1 b2 b3 a2 b4"),
        (named("a1", priority=1) + named("b1 b2"), "b1 b2 a1"),
        (named("a1") + named("b1 b2", priority=-1), "b1 b2 a1"),
    ],
)
def test_priorities_come_first_and_then_who_was_served_least(items: list[Item], expected: str) -> None:
    assert order(queue_of(*items)) == expected


@pytest.mark.parametrize(
    ("weight", "expected"), [(1.0, "a1 b1 a2 b2 b3"), (2.0, "a1 b1 b2 a2 b3"), (0.5, "a1 b1 a2 b2 b3")]
)
def test_a_weight_divides_what_a_request_costs(weight: float, expected: str) -> None:
    queue = queue_of(*named("a1 a2", 15))
    for item in named("b1 b2 b3", 20):
        queue.push(item, weight)
    assert order(queue) == expected


def test_who_comes_late_has_no_claim_on_the_time_before() -> None:
    queue = queue_of(*named("a1 a2 a3 a4 a5 a6"))
    assert [queue.pop().name for _ in range(4)] == ["a1", "a2", "a3", "a4"]
    for item in named("b1 b2 b3"):
        queue.push(item)
    assert order(queue) == "b1 a5 b2 a6 b3"


def test_an_empty_queue_forgets_who_had_how_much() -> None:
    queue = queue_of(*named("a1", 1000))
    assert order(queue) == "a1"
    for item in named("b1 a2 b2 a3"):
        queue.push(item)
    assert order(queue) == "b1 a2 b2 a3"


def test_while_somebody_waits_it_is_remembered_who_had_how_much() -> None:
    queue = queue_of(*named("a1", 25), *named("b1 b2 b3 b4"))
    assert queue.pop().name == "a1"
    queue.push(Item("a2"))
    assert order(queue) == "b1 b2 b3 a2 b4"


def test_a_resumed_request_goes_before_every_priority_and_in_turn_with_its_like() -> None:
    queue = queue_of(*named("a1", priority=-5))
    first, second = named("b1 b2")
    queue.push_front(first)
    queue.push_front(second)
    assert queue.peek() is first
    assert (queue.length, queue.tokens) == (3, 30)
    assert order(queue) == "b1 b2 a1"


def test_suspects_wait_apart() -> None:
    queue = queue_of(*named("a1"))
    first, second = named("s1 s2", 7)
    assert (queue.suspects, queue.first_suspect()) == (0, None)
    queue.push_suspect(first)
    queue.push_suspect(second)
    assert (queue.suspects, queue.length, queue.tokens, len(queue)) == (2, 3, 24, 3)
    assert order(queue) == "a1"
    assert (queue.peek(), queue.pop()) == (None, None)
    assert queue.first_suspect() is first
    assert queue.pop_suspect() is first
    assert (queue.suspects, queue.length, queue.tokens) == (1, 1, 7)
    queue.remove(second)
    assert (queue.suspects, queue.length, queue.tokens, queue.items()) == (0, 0, 0, [])


def test_counts_follow_each_that_comes_and_goes() -> None:
    queue = FairQueue()
    assert (queue.length, queue.tokens) == (0, 0)
    one, two = Item("a1", 3), Item("b1", 5)
    queue.push(one)
    queue.push(two)
    assert (queue.length, queue.tokens) == (2, 8)
    queue.remove(one)
    assert (queue.length, queue.tokens) == (1, 5)
    queue.remove(one)
    queue.remove(Item("c1", 9))
    assert (queue.length, queue.tokens) == (1, 5)
    assert queue.peek() is two
    assert (queue.length, queue.tokens) == (1, 5)
    assert queue.pop() is two
    assert (queue.length, queue.tokens) == (0, 0)


@pytest.mark.parametrize("front", [False, True])
def test_what_was_removed_is_passed_over_wherever_it_stood(front: bool) -> None:
    queue, items = FairQueue(), named("a1 b1 c1 d1 e1")
    for item in items:
        (queue.push_front if front else queue.push)(item)
    for gone in (0, 1, 3):
        queue.remove(items[gone])
    assert sorted(item.name for item in queue.items()) == ["c1", "e1"]
    assert order(queue) == "c1 e1"


def test_one_that_was_removed_may_come_again() -> None:
    queue, item = FairQueue(), Item("a1")
    queue.push(item)
    queue.remove(item)
    assert queue.pop() is None
    queue.push(item)
    assert order(queue) == "a1"


@pytest.mark.parametrize(
    ("removed", "left", "kept"), [(64, 1, 65), (65, 1, 1), (65, 64, 64), (65, 65, 130), (66, 65, 65), (65, 66, 131)]
)
def test_what_was_removed_is_dropped_once_it_is_much_and_the_more(removed: int, left: int, kept: int) -> None:
    queue = FairQueue()
    stay, go = [Item(f"a{i}") for i in range(left)], [Item(f"b{i}") for i in range(removed)]
    for item in stay + go:
        queue.push(item)
    for item in go:
        queue.remove(item)
    assert len(queue._heap) == kept
    assert order(queue) == " ".join(item.name for item in stay)


def test_the_order_stands_after_what_was_removed_is_dropped() -> None:
    queue = FairQueue()
    items = [Item(f"{'abcdefg'[i % 7]}{i}", priority=i * 37 % 50) for i in range(200)]
    resumed = [Item(f"r{i}") for i in range(100)]
    for item in items:
        queue.push(item)
    for item in resumed:
        queue.push_front(item)
    for item in items[:170] + resumed[::2]:
        queue.remove(item)
    assert len(queue._heap) + len(queue._front) < 220
    assert [queue.pop() for _ in range(50)] == resumed[1::2]
    priorities = []
    while (item := queue.pop()) is not None:
        priorities.append(item.priority)
    assert priorities == sorted(item.priority for item in items[170:])
