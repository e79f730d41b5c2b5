"""The best rate that was seen, with its conditions; and the loss against it, all of it, each part to one cause."""

from dataclasses import replace

import pytest

from megatoken.cluster.decide.efficiency import CAUSES, RAMP_S, RATE_S, Best, Reading, efficiency_of, learn

SPEC = ("m", "r1", "mi355x")
WELL = Reading("m-1", SPEC, 1000.0, running=64, waiting=0, ready_s=100.0)
BEST = {SPEC: Best(1000.0, 64, "m-9", 5.0)}


def test_the_best_is_kept_with_its_conditions_and_only_a_better_one_replaces_it() -> None:
    first = learn({}, [WELL], 7.0)
    assert first == {SPEC: Best(1000.0, 64, "m-1", 7.0)}
    assert learn(first, [replace(WELL, tokens_per_s=900.0)], 8.0) == first
    assert learn(first, [replace(WELL, tokens_per_s=1010.0)], 8.0) == first, "one percent is noise"
    assert learn(first, [replace(WELL, tokens_per_s=1011.0, running=80)], 8.0)[SPEC] == Best(1011.0, 80, "m-1", 8.0)
    other = ("m", "r1", "cpu")
    assert learn(first, [replace(WELL, spec=other, tokens_per_s=3.0)], 8.0).keys() == {SPEC, other}


def test_a_rate_counts_once_it_was_held_long_enough() -> None:
    assert learn({}, [replace(WELL, ready_s=RATE_S - 0.1)], 7.0) == {}
    assert learn({}, [replace(WELL, ready_s=RATE_S)], 7.0).keys() == {SPEC}
    assert learn({}, [replace(WELL, tokens_per_s=0.0)], 7.0) == {}, "an idle replica shows nothing"


@pytest.mark.parametrize(
    ("fields", "queued", "cause"),
    [
        ({"ready_s": RAMP_S - 0.1, "running": 0}, 9, "ramp"),
        ({"ready_s": RAMP_S, "running": 63}, 0, "idle"),
        ({"running": 63, "waiting": 1}, 0, "imbalance"),
        ({"running": 63}, 1, "imbalance"),
        ({"running": 64}, 0, "queue"),
        ({"running": 64, "waiting": 5}, 5, "queue"),
    ],
)
def test_a_shortfall_has_one_cause(fields: dict[str, float], queued: int, cause: str) -> None:
    found = efficiency_of("m", BEST, [replace(WELL, tokens_per_s=400.0, **fields)], queued)
    assert found is not None
    assert found.lost == {**dict.fromkeys(CAUSES, 0.0), cause: 600.0}
    assert found.held_back_by == cause


def test_rate_and_losses_make_up_the_capacity() -> None:
    readings = [
        WELL,
        replace(WELL, replica="m-2", tokens_per_s=250.0, running=10),
        replace(WELL, replica="m-3", tokens_per_s=900.0),
        replace(WELL, replica="m-4", tokens_per_s=0.0, ready_s=1.0),
    ]
    found = efficiency_of("m", BEST, readings, 0)
    assert found is not None
    assert (found.capacity, found.rate) == (4000.0, 2150.0)
    assert found.lost == {"ramp": 1000.0, "idle": 750.0, "imbalance": 0.0, "queue": 100.0}
    assert found.rate + sum(found.lost.values()) == found.capacity
    assert found.held_back_by == "ramp"


def test_nothing_is_said_while_the_best_of_a_replica_is_not_known() -> None:
    assert efficiency_of("m", BEST, [], 0) is None
    assert efficiency_of("m", BEST, [WELL, replace(WELL, spec=("m", "r2", "mi355x"))], 0) is None
    at_best = efficiency_of("m", BEST, [replace(WELL, tokens_per_s=1005.0)], 0)
    assert at_best is not None
    assert at_best.held_back_by == "", "a replica above its best loses nothing"
