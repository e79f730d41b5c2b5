"""What each scorer says in seconds, what is drawn, and which is picked, in exact figures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from megatoken.router.fleet.affinity_seeds import seed_of
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.fleet.routing_request import RoutingRequest
from megatoken.router.policies.affinity import SPILL_S, Affinity, home
from megatoken.router.policies.joined import FEW
from megatoken.router.policies.least_tokens import not_avoided, two_of, work_s
from megatoken.router.policies.lora import LOAD_S, Lora
from megatoken.router.policies.make import make_policy
from megatoken.router.policies.names import MOST_WEIGHT, parse_policy, policy_text
from megatoken.router.policies.prefix import Prefix
from megatoken.router.policies.site import NEAR_S, Site
from tests.support.router_core import CoreFleet


def fleet_of(size: int, **fields: Any) -> CoreFleet:
    """Replicas that decode 1000 tokens a second and prefill 10,000."""
    fleet = CoreFleet(replicas=0)
    for i in range(size):
        replica = fleet.add_replica(f"m-{i}", **fields)
        replica.capacity.decode_tokens_per_s, replica.capacity.prefill_tokens_per_s = 1000.0, 10_000.0
    return fleet


def asked(**fields: Any) -> RoutingRequest:
    return RoutingRequest(**{"prompt_tokens": 100, "expected_tokens": 200, **fields})


def close(fleet: CoreFleet, *indexes: int) -> None:
    for index in indexes:
        replica = fleet.replicas_now()[index]
        replica.draining = True
        fleet.state.fleet.refresh(replica, fleet.now)


class Scripted(random.Random):
    """Gives these numbers, again and again."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(0)
        self._numbers, self.drawn = numbers, 0

    def random(self) -> float:
        self.drawn += 1
        return self._numbers[(self.drawn - 1) % len(self._numbers)]


@pytest.mark.parametrize(
    ("decode", "prompt", "expected_s"), [(0.0, 0.0, 0.21), (1000.0, 0.0, 1.21), (0.0, 1000.0, 0.31), (300, 500, 0.56)]
)
def test_work_is_what_is_there_and_the_request_over_both_speeds(
    decode: float, prompt: float, expected_s: float
) -> None:
    replica = fleet_of(1).replicas_now()[0]
    replica.decode_outstanding, replica.prompt_outstanding = decode, prompt
    assert work_s(replica, asked()) == pytest.approx(expected_s)


@pytest.mark.parametrize(
    ("avoid", "left"), [((), [0, 1, 2]), ((1,), [0, 2]), ((0, 2), [1]), ((0, 1, 2), [0, 1, 2]), ((9,), [0, 1, 2])]
)
def test_those_that_lost_it_are_left_out_while_others_are_there(avoid: Sequence[int], left: list[int]) -> None:
    found = not_avoided(fleet_of(3).pool.open, asked(avoid=frozenset(avoid)))
    assert [replica.index for replica in found] == left


@pytest.mark.parametrize(
    ("numbers", "drawn"),
    [
        ((0.0, 0.0), [0, 1]),
        ((0.0, 0.99), [0, 4]),
        ((0.99, 0.0), [4, 0]),
        ((0.99, 0.99), [4, 3]),
        ((0.41, 0.51), [2, 3]),
        ((0.41, 0.49), [2, 1]),
        ((0.21, 0.26), [1, 2]),
    ],
)
def test_two_different_ones_are_drawn(numbers: tuple[float, float], drawn: list[int]) -> None:
    found = two_of(fleet_of(5).pool.open, Scripted(*numbers))
    assert [replica.index for replica in found] == drawn


@pytest.mark.parametrize("size", [0, 1, 2])
def test_of_two_or_fewer_all_are_drawn_and_no_number_is(size: int) -> None:
    rng, places = Scripted(0.9), fleet_of(size).pool.open
    assert list(two_of(places, rng)) == places
    assert rng.drawn == 0


def test_of_three_each_pair_is_drawn_as_often() -> None:
    rng, places = random.Random(1), fleet_of(3).pool.open
    pairs = [tuple(sorted(replica.index for replica in two_of(places, rng))) for _ in range(3000)]
    assert all(850 < pairs.count(pair) < 1150 for pair in ((0, 1), (0, 2), (1, 2)))


def test_of_equals_the_first_that_was_drawn_is_picked() -> None:
    fleet = fleet_of(2)
    chosen = make_policy("least_tokens").choose(fleet.pool, asked(), random.Random(1))
    assert chosen is fleet.pool.open[0]


def test_round_robin_goes_through_all_in_turn_and_passes_over_those_avoided() -> None:
    fleet, policy, rng = fleet_of(4), make_policy("round_robin"), random.Random(1)

    def turns(count: int, *avoid: int) -> list[int]:
        chosen = [policy.choose(fleet.pool, asked(avoid=frozenset(avoid)), rng) for _ in range(count)]
        return [-1 if replica is None else replica.index for replica in chosen]

    assert turns(6) == [1, 2, 3, 0, 1, 2]
    assert turns(3, 3, 0) == [1, 2, 1]
    assert turns(2, 0, 1, 2) == [3, 3]
    assert turns(2, 0, 1, 2, 3) == [3, 3]
    close(fleet, 0, 1, 2, 3)
    assert turns(1) == [-1]


def test_a_key_makes_its_home_free_and_all_others_cost_the_spill() -> None:
    fleet = fleet_of(5)
    scored = Affinity().score(fleet.pool, asked(affinity="k"), random.Random(1))
    assert scored is not None
    (kept,) = scored.worth_a_look
    assert [scored.seconds(replica) for replica in fleet.replicas_now()] == [
        0.0 if replica is kept else 2.0 for replica in fleet.replicas_now()
    ]
    assert SPILL_S == 2.0
    assert Affinity().score(fleet.pool, asked(), random.Random(1)) is None
    close(fleet, 0, 1, 2, 3, 4)
    assert Affinity().score(fleet.pool, asked(affinity="k"), random.Random(1)) is None


def weight(key: str, name: str) -> int:
    """MurmurHash3's finaliser of the names' hashes, in whole numbers."""
    word, mask = int(seed_of(name) ^ seed_of(key)), 2**64 - 1
    word = (word ^ (word >> 33)) * 0xFF51AFD7ED558CCD & mask
    word = (word ^ (word >> 33)) * 0xC4CEB9FE1A85EC53 & mask
    return word ^ (word >> 33)


@pytest.mark.parametrize("key", [f"chat-{i}" for i in range(20)])
def test_a_key_goes_to_the_heaviest_that_is_open(key: str) -> None:
    fleet = fleet_of(6)
    by_weight: list[Endpoint] = sorted(fleet.replicas_now(), key=lambda replica: -weight(key, replica.name))
    for heaviest in by_weight:
        assert home(fleet.pool, key) is heaviest
        close(fleet, heaviest.index)
    assert home(fleet.pool, key) is None
    assert home(fleet_of(0).pool, key) is None
    assert fleet.pool.seeds.dtype == np.uint64


@pytest.mark.parametrize(("lora", "costs"), [("a", [0.0, 2.0]), ("b", [2.0, 2.0])])
def test_an_adapter_costs_its_loading_where_it_is_not(lora: str, costs: list[float]) -> None:
    fleet = fleet_of(1, loras=("a",))
    fleet.add_replica("m-1")
    scored = Lora().score(fleet.pool, asked(lora=lora), random.Random(1))
    assert scored is not None
    assert [scored.seconds(replica) for replica in fleet.replicas_now()] == costs
    assert LOAD_S == 2.0


@pytest.mark.parametrize(
    ("having", "closed", "looked_at"),
    [(1, (), 1), (4, (), 4), (5, (), 2), (4, (0, 2), 2), (4, (0, 1, 2, 3), 0), (9, (), 2)],
)
def test_few_that_have_an_adapter_are_all_looked_at(having: int, closed: tuple[int, ...], looked_at: int) -> None:
    fleet = fleet_of(having, loras=("a",))
    close(fleet, *closed)
    scored = Lora().score(fleet.pool, asked(lora="a"), random.Random(1))
    assert scored is not None
    assert len(scored.worth_a_look) == looked_at
    assert all(replica.open_at >= 0 for replica in scored.worth_a_look)
    assert Lora().score(fleet.pool, asked(), random.Random(1)) is None


@pytest.mark.parametrize(
    ("held", "prompt_tokens", "saved_tokens"),
    [(0, 300, 0), (1, 300, 128), (2, 300, 256), (2, 257, 256), (2, 256, 255), (2, 130, 129)],
)
def test_cached_blocks_save_their_prefill_but_for_one_token(held: int, prompt_tokens: int, saved_tokens: int) -> None:
    fleet = fleet_of(2)
    replica, hashes = fleet.replicas_now()[0], (1, 2)
    fleet.pool.prefixes.record(replica, hashes[:held])
    request = asked(prompt_tokens=prompt_tokens, prefix_hashes=hashes)
    scored = Prefix().score(fleet.pool, request, random.Random(1))
    assert scored is not None
    assert scored.seconds(replica) == pytest.approx(-saved_tokens / 10_000)
    assert list(scored.worth_a_look) == ([replica] if held else [])
    assert Prefix().score(fleet.pool, asked(), random.Random(1)) is None


@pytest.mark.parametrize(
    ("site", "client", "expected_s"), [("a", "a", 0.03), ("a", "b", 0.05), ("a", "", 0.05), ("", "", 0.05)]
)
def test_a_replica_costs_its_round_trip_less_a_start_where_it_is_near(
    site: str, client: str, expected_s: float
) -> None:
    fleet = fleet_of(5, site=site)
    replica = fleet.replicas_now()[0]
    replica.rtt_s = 0.05
    scored = Site().score(fleet.pool, asked(site=client), random.Random(1))
    assert scored is not None
    assert scored.seconds(replica) == pytest.approx(expected_s)
    assert len(scored.worth_a_look) == 2
    assert NEAR_S == 0.02


@pytest.mark.parametrize(("number", "first"), [(0.0, 0), (0.24, 0), (0.26, 1), (0.74, 2), (0.99, 3)])
def test_of_few_equals_each_is_picked_by_chance(number: float, first: int) -> None:
    fleet = fleet_of(FEW)
    chosen = make_policy("prefix").choose(fleet.pool, asked(), Scripted(number))
    assert chosen is fleet.replicas_now()[first]


@pytest.mark.parametrize(("size", "best"), [(3, True), (4, True), (5, False)])
def test_few_are_all_looked_at_and_of_many_two(size: int, best: bool) -> None:
    fleet = fleet_of(size)
    for replica in fleet.replicas_now()[:-1]:
        replica.decode_outstanding = 1000.0
    chosen = make_policy("prefix").choose(fleet.pool, asked(), Scripted(0.0))
    assert (chosen is fleet.replicas_now()[-1]) is best


@pytest.mark.parametrize(("avoid", "index"), [((), 0), ((0,), 1), ((0, 1), 2)])
def test_of_many_two_are_drawn_that_did_not_lose_it(avoid: tuple[int, ...], index: int) -> None:
    fleet = fleet_of(6)
    chosen = make_policy("prefix").choose(fleet.pool, asked(avoid=frozenset(avoid)), Scripted(0.0))
    assert chosen is fleet.replicas_now()[index]


@pytest.mark.parametrize(("weight_text", "kept"), [("1.25*", True), ("1.2*", False)])
def test_a_weight_multiplies_the_seconds_of_its_scorer(weight_text: str, kept: bool) -> None:
    fleet = fleet_of(2)
    found = home(fleet.pool, "k")
    assert found is not None
    found.decode_outstanding = 2450.0  # 2.45 s behind: more than 1.2 times the spill
    chosen = make_policy(f"{weight_text}affinity").choose(fleet.pool, asked(affinity="k"), random.Random(1))
    assert (chosen is found) is kept


@pytest.mark.parametrize(("text", "wants"), [("prefix + site", True), ("site + affinity + lora", False)])
def test_prefixes_are_hashed_only_for_a_policy_that_asks_for_them(text: str, wants: bool) -> None:
    assert make_policy(text).wants_prefix is wants
    assert not make_policy("least_tokens").wants_prefix
    assert not make_policy("round_robin").wants_prefix


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("1000*site", "1000*site"),
        ("0.001*site", "0.001*site"),
        ("1.0 * site", "site"),
        ("1*least_tokens", "least_tokens"),
    ],
)
def test_weights_up_to_a_thousand_are_written_one_way(text: str, written: str) -> None:
    assert policy_text(parse_policy(text)) == written
    assert MOST_WEIGHT == 1000.0


@pytest.mark.parametrize(
    "text", ["1000.1*site", "0*site", "0.0*site", "0.5*least_tokens", "least_tokens + round_robin"]
)
def test_other_weights_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        parse_policy(text)
