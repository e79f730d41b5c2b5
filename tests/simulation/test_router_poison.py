"""Requests that end the engine that takes them: each costs two replicas at most, and no other stream is broken.

The engines are those of the chaos test, and die at the first step with a poison in the batch. One printed seed
reproduces a run.
"""

from __future__ import annotations

import random

import pytest

from megatoken.router.core.request import Request
from megatoken.router.fleet.fleet import Endpoint
from megatoken.v1 import tokens_pb2
from tests.simulation.test_router_chaos import Engine, undisturbed
from tests.support.router_core import ERROR, CoreFleet

POISON = 49_999
TURN_S = 0.02


class Mortal:
    """A fleet whose replicas die of a poison, and are replaced a while later."""

    def __init__(self, replicas: int, seed: int, says_so: bool) -> None:
        self.rng = random.Random(seed)
        self.fleet = CoreFleet(replicas=replicas, max_running=256)
        self.engines = {replica: Engine() for replica in self.fleet.replicas}
        self.says_so = says_so
        self.deaths: dict[int, int] = {}  # by poison, its second prompt token
        self.replacements: list[int] = []
        self.made = replicas

    def turn(self, at: int) -> None:
        for replica in list(self.engines):
            engine = self.engines[replica]
            engine.take(self.fleet, replica)
            poisons = [s["tokens"][1] for s in engine.streams.values() if s["tokens"][0] == POISON]
            if poisons:
                self._die(replica, poisons, at)
            else:
                engine.step(self.fleet, replica, self.rng)
        while self.replacements and self.replacements[0] <= at:
            self.replacements.pop(0)
            self.engines[self.fleet.add_replica(f"m-{self.made}")] = Engine()
            self.made += 1
        self.fleet.tick(TURN_S)

    def _die(self, replica: Endpoint, poisons: list[int], at: int) -> None:
        for poison in poisons:
            self.deaths[poison] = self.deaths.get(poison, 0) + 1
        engine, fleet = self.engines.pop(replica), self.fleet
        if self.says_so:
            ends = [tokens_pb2.Finish(stream=slot, reason=ERROR, code=14, engine_dead=True) for slot in engine.streams]
            fleet.frame(replica, finish=ends)
        fleet.lose(replica)
        fleet.state.fleet.remove(replica)
        fleet.state.fleet.release(replica)
        self.replacements.append(at + 50)


@pytest.mark.parametrize("says_so", [True, False], ids=["engine_dead", "session_lost"])
@pytest.mark.parametrize("seed", range(4))
def test_a_poison_costs_two_replicas_at_most_and_every_other_stream_is_whole(seed: int, says_so: bool) -> None:
    print(f"seed {seed}")
    world = Mortal(replicas=6, seed=seed, says_so=says_so)
    fleet, rng = world.fleet, world.rng
    requests: list[tuple[Request, list[int], int]] = []
    poisons: list[Request] = []
    poisoned_at = rng.sample(range(100, 900), 4)
    at = 0
    while len(requests) < 1000:
        for _ in range(25):  # a burst: many are without a first token when a poison strikes
            if len(requests) in poisoned_at and len(poisons) < 4:
                poisoned_at.remove(len(requests))
                poisons.append(fleet.submit(prompt=(POISON, len(poisons)), max_tokens=5))
            prompt, count = [rng.randrange(POISON) for _ in range(3)], rng.randrange(1, 60)
            requests.append((fleet.submit(prompt=tuple(prompt), max_tokens=count), prompt, count))
        world.turn(at)
        at += 1
    while fleet.state.live:
        world.turn(at)
        at += 1
        assert at < 1500, f"{fleet.state.live} requests are left after {at * TURN_S} s"
    assert len(poisons) == len(world.deaths) == 4
    assert max(world.deaths.values()) == 2
    for poison in poisons:
        end = fleet.end(poison)
        assert end is not None
        assert (end.reason, end.code) == (ERROR, 14)
        assert "it alone had none there" in end.message
    for request, prompt, count in requests:
        end = fleet.end(request)
        assert end is not None
        assert end.reason == tokens_pb2.FINISH_REASON_LENGTH, end.message
        assert fleet.received(request) == undisturbed(prompt, count, 0)
    fleet.check_idle()
    assert not any(replica.ward or replica.trial for replica in fleet.replicas_now())
