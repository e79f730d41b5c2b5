"""Each policy by table: who is open, what is asked, who gets it."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest

from megatoken.router.fleet.capacity import Rates
from megatoken.router.fleet.prefix_index import MOST, block_hashes
from megatoken.router.fleet.routing_request import RoutingRequest
from megatoken.router.policies.make import make_policy
from megatoken.router.policies.names import ALONE, SCORERS, parse_policy, policy_text
from megatoken.tokens.frames import pack
from tests.support.router_core import CoreFleet

JOINED = "2*prefix + affinity + lora + site"


def fleet_of(**columns: list[Any]) -> CoreFleet:
    """Replicas with given outstanding tokens, speeds, sites, adapters."""
    size = len(next(iter(columns.values())))
    fleet = CoreFleet(replicas=0, max_running=100)
    for i in range(size):
        fields = {}
        if "site" in columns:
            fields["site"] = columns["site"][i]
        if "loras" in columns:
            fields["loras"] = columns["loras"][i]
        replica = fleet.add_replica(f"m-{i}", **fields)
        replica.decode_outstanding = float(columns.get("outstanding", [0] * size)[i])
        replica.rtt_s = columns.get("rtt_s", [0.0] * size)[i]
        fleet.pool.prefixes.record(replica, columns.get("prefixes", [()] * size)[i])
        speed = columns.get("speed", [1.0] * size)[i]
        replica.capacity.rates = Rates()
        replica.capacity.decode_tokens_per_s = 1000.0 * speed
        replica.capacity.prefill_tokens_per_s = 10_000.0 * speed
    return fleet


def chosen(fleet: CoreFleet, policy: str, times: int = 400, **asked: Any) -> Counter[str]:
    rng = random.Random(3)
    made = make_policy(policy)
    asked = RoutingRequest(**{"prompt_tokens": 100, "expected_tokens": 100, **asked})
    found = Counter()
    for _ in range(times):
        replica = made.choose(fleet.pool, asked, rng)
        found[replica.name if replica else "nobody"] += 1
    return found


@pytest.mark.parametrize("policy", [*ALONE, *SCORERS, JOINED])
def test_nobody_open_is_nobody_chosen(policy: str) -> None:
    assert chosen(CoreFleet(replicas=0), policy, 3) == {"nobody": 3}


@pytest.mark.parametrize("policy", [*ALONE, *SCORERS, JOINED])
def test_one_that_lost_the_request_is_avoided_while_there_is_another(policy: str) -> None:
    fleet = fleet_of(outstanding=[0, 5000, 5000])
    assert "m-0" not in chosen(fleet, policy, 100, avoid=frozenset({0}))
    alone = fleet_of(outstanding=[0])
    assert chosen(alone, policy, 3, avoid=frozenset({0})) == {"m-0": 3}


def test_round_robin_takes_turns_whatever_the_load() -> None:
    assert set(chosen(fleet_of(outstanding=[0, 99_999, 5]), "round_robin", 300).values()) == {100}


@pytest.mark.parametrize(
    ("columns", "best"),
    [
        ({"outstanding": [100, 900]}, "m-0"),
        ({"outstanding": [900, 100]}, "m-1"),
        ({"outstanding": [300, 600], "speed": [1.0, 3.0]}, "m-1"),  # twice the work at three times the speed
    ],
)
def test_least_tokens_takes_the_one_that_is_done_sooner(columns: dict[str, list[Any]], best: str) -> None:
    assert chosen(fleet_of(**columns), "least_tokens", 50) == {best: 50}


def test_least_tokens_never_sends_to_the_worst_of_many() -> None:
    assert "m-4" not in chosen(fleet_of(outstanding=[1, 2, 3, 4, 50_000]), "least_tokens")


def test_affinity_keeps_a_key_until_its_replica_is_far_behind() -> None:
    fleet = fleet_of(outstanding=[0] * 8)
    home = chosen(fleet, "affinity", 50, affinity="chat-7")
    assert len(home) == 1
    (name,) = home
    replica = next(r for r in fleet.replicas_now() if r.name == name)
    replica.decode_outstanding = 1500.0  # 1.5 s more: still worth it
    assert chosen(fleet, "affinity", 50, affinity="chat-7") == {name: 50}
    replica.decode_outstanding = 50_000.0
    assert name not in chosen(fleet, "affinity", 50, affinity="chat-7")
    assert len(chosen(fleet, "affinity", 200)) == 7  # no key: spread, but for the one that is far behind


def test_a_replica_that_joins_takes_its_share_of_keys_and_moves_no_other() -> None:
    def homes(fleet: CoreFleet) -> dict[str, str]:
        rng, policy = random.Random(1), make_policy("affinity")
        keys = [f"chat-{i}" for i in range(4000)]
        replicas = {key: policy.choose(fleet.pool, RoutingRequest(10, 10, affinity=key), rng) for key in keys}
        return {key: replica.name for key, replica in replicas.items() if replica is not None}

    fleet = fleet_of(outstanding=[0] * 4)
    before = homes(fleet)
    assert all(800 < count < 1200 for count in Counter(before.values()).values())
    fleet.add_replica("m-new")
    after = homes(fleet)
    moved = {key: name for key, name in after.items() if name != before[key]}
    assert set(moved.values()) == {"m-new"}
    assert 0.17 < len(moved) / 4000 < 0.23
    fleet.lose(next(r for r in fleet.replicas_now() if r.name == "m-new"))
    assert homes(fleet) == before


def test_an_affinity_key_whose_home_is_down_goes_to_one_other_and_not_back_to_the_dead() -> None:
    fleet = fleet_of(outstanding=[0] * 8)
    (name,) = chosen(fleet, "affinity", 5, affinity="k")
    dead = next(r for r in fleet.replicas_now() if r.name == name)
    fleet.lose(dead)
    moved = chosen(fleet, "affinity", 50, affinity="k")
    assert len(moved) == 1
    assert name not in moved


def test_lora_goes_where_the_adapter_is() -> None:
    fleet = fleet_of(loras=[(), ("a",), (), ("a", "b")], outstanding=[0, 100, 0, 100])
    assert set(chosen(fleet, "lora", lora="a")) == {"m-1", "m-3"}
    assert chosen(fleet, "lora", 50, lora="b") == {"m-3": 50}
    assert len(chosen(fleet, "lora", lora="c")) > 1


def test_site_prefers_near_until_near_is_busy() -> None:
    near = fleet_of(site=["a", "b"], rtt_s=[0.01, 0.12], outstanding=[0, 0])
    assert chosen(near, "site", 50) == {"m-0": 50}
    busy = fleet_of(site=["a", "b"], rtt_s=[0.01, 0.12], outstanding=[500, 0])
    assert chosen(busy, "site", 50) == {"m-1": 50}
    at_b = fleet_of(site=["a", "b"], rtt_s=[0.01, 0.015], outstanding=[0, 0])
    assert chosen(at_b, "site", 50, site="b") == {"m-1": 50}


def test_prefix_goes_to_the_longest_cached_prefix_while_it_is_worth_it() -> None:
    hashes = tuple(range(1, 9))  # 8 blocks of 128 tokens: 0.1 s of prefill
    fleet = fleet_of(prefixes=[(), hashes[:2], hashes[:7]], outstanding=[0, 0, 0])
    asked = {"prompt_tokens": 1024, "prefix_hashes": hashes}
    assert chosen(fleet, "prefix", 50, **asked) == {"m-2": 50}
    fleet.replicas_now()[2].decode_outstanding = 500.0  # half a second behind: more than the cache saves
    assert "m-2" not in chosen(fleet, "prefix", 50, **asked)


def test_a_single_popular_prompt_does_not_melt_one_replica() -> None:
    hashes = tuple(range(1, 9))
    fleet = fleet_of(prefixes=[hashes, (), (), ()], outstanding=[0] * 4)
    made, rng = make_policy("prefix"), random.Random(5)
    asked = RoutingRequest(1024, 200, prefix_hashes=hashes)
    for _ in range(200):
        replica = made.choose(fleet.pool, asked, rng)
        assert replica is not None
        replica.decode_outstanding += 200
        fleet.pool.prefixes.record(replica, hashes)
    work = [replica.decode_outstanding for replica in fleet.replicas_now()]
    assert max(work) < 1.2 * sum(work) / len(work)


def test_an_unknown_policy_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="policy: 'best' is not allowed; least_tokens, round_robin"):
        make_policy("best")


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("prefix", {"prefix": 1.0}),
        ("site+prefix", {"prefix": 1.0, "site": 1.0}),
        (" 0.5*site +  2 * prefix ", {"prefix": 2.0, "site": 0.5}),
        (JOINED, {"prefix": 2.0, "affinity": 1.0, "lora": 1.0, "site": 1.0}),
        ("least_tokens", {"least_tokens": 1.0}),
    ],
)
def test_a_policy_as_a_spec_writes_it(text: str, weights: dict[str, float]) -> None:
    assert parse_policy(text) == weights
    assert parse_policy(policy_text(weights)) == weights
    assert make_policy(text).name == policy_text(weights)


@pytest.mark.parametrize(
    "text",
    ["", "prefix +", "prefix site", "prefix + prefix", "0*prefix", "-1*prefix", "1e3*prefix", "2000*site",
     "least_tokens + site", "2*round_robin", "prefix, site"],
)  # fmt: skip
def test_what_is_no_policy_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ValueError, match="policy: ") as refused:
        make_policy(text)
    assert repr(text) in str(refused.value)


def test_joined_scorers_add_up_in_seconds() -> None:
    hashes = tuple(range(1, 9))  # 8 blocks of 128 tokens: 0.1 s of prefill
    columns = {"prefixes": [hashes, (), ()], "rtt_s": [0.12, 0.0, 0.3], "site": ["far", "near", "far"]}
    asked = {"prompt_tokens": 1024, "prefix_hashes": hashes}
    fleet = fleet_of(**columns, outstanding=[0, 0, 0])
    assert chosen(fleet, "prefix", 50, **asked) == {"m-0": 50}
    assert chosen(fleet, "site", 50, **asked) == {"m-1": 50}
    assert chosen(fleet, "prefix + site", 50, **asked) == {"m-1": 50}  # the way there costs more than the cache saves
    assert chosen(fleet, "2*prefix + site", 50, **asked) == {"m-0": 50}
    fleet = fleet_of(**columns, loras=[(), (), ("a",)], outstanding=[0, 0, 0])
    assert chosen(fleet, "prefix + lora + site", 50, lora="a", **asked) == {"m-2": 50}
    assert chosen(fleet, "prefix + 0.1*lora + site", 50, lora="a", **asked) == {"m-1": 50}


def test_a_request_that_no_scorer_has_a_say_on_goes_by_work() -> None:
    fleet = fleet_of(outstanding=[300, 100, 200])
    assert chosen(fleet, "prefix + affinity + lora", 50) == {"m-1": 50}


@pytest.mark.parametrize("policy", [*ALONE, *SCORERS, JOINED])
def test_a_choice_costs_the_same_with_a_thousand_replicas_as_with_ten(policy: str) -> None:
    def cost_s(size: int) -> float:
        fleet = fleet_of(outstanding=[i % 7 * 100 for i in range(size)])
        made, rng = make_policy(policy), random.Random(1)
        asked = RoutingRequest(100, 100, affinity="k", lora="a", prefix_hashes=(1, 2, 3))
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(100):
                made.choose(fleet.pool, asked, rng)
            best = min(best, (time.perf_counter() - began) / 100)
        return best

    small, large = cost_s(10), cost_s(1000)
    assert large < 20e-6 or large < 4 * small


def test_block_hashes_are_chained_and_kept_apart_by_salt() -> None:
    one, other = pack(range(300)), pack([9, *range(1, 300)])
    assert len(block_hashes(one)) == 2
    assert block_hashes(pack([*range(256), 7]))[:2] == block_hashes(one)
    assert not set(block_hashes(one)) & set(block_hashes(other))
    assert not set(block_hashes(one)) & set(block_hashes(one, "tenant"))


def test_the_prefix_book_is_bounded_and_forgets_the_lost() -> None:
    fleet = CoreFleet(replicas=2, policy="prefix")
    first, second = fleet.replicas
    book = fleet.pool.prefixes
    for start in range(0, 3 * MOST, 4):
        book.record(first, tuple(range(start, start + 4)))
    book.record(second, (3 * MOST - 1,))
    assert (len(first.prefixes), len(book)) == (MOST, MOST)
    assert book.holders((3 * MOST - 1,), 4) == [first, second]
    fleet.lose(first)
    assert (len(first.prefixes), len(book)) == (0, 1)


def test_requests_with_one_prefix_follow_each_other() -> None:
    fleet = CoreFleet(replicas=16, policy="prefix", max_running=64)
    prompt = tuple(range(1, 1000))
    first = fleet.submit(prompt=prompt, max_tokens=1)
    fleet.tokens(first, 1)
    names = {fleet.replica_of(fleet.submit(prompt=prompt, max_tokens=1)).name for _ in range(5)}
    assert names == {fleet.replica_of(first).name}
    others = {fleet.replica_of(fleet.submit(prompt=(i, *prompt), max_tokens=1)).name for i in range(30)}
    assert len(others) > 5
