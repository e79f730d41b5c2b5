"""Random losses, cancels, drains and delays: every stream is the undisturbed one, exactly once, and nothing is left.

A greedy engine's next token is a function of all tokens before it; a stateful one's of the seed and the position as
well. So a stream that was put together wrongly anywhere shows. One printed seed reproduces a run.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

import pytest

from megatoken.router.core.lifecycle import RequestState
from megatoken.router.core.request import Request
from megatoken.router.fleet.fleet import Endpoint
from megatoken.v1 import tokens_pb2
from tests.support.router_core import CANCELLED, CoreFleet


def next_token(tokens: list[int], seed: int, made: int) -> int:
    text = f"{tokens}:{seed}:{made if seed else 0}"
    return zlib.crc32(text.encode()) % 50_000


def undisturbed(prompt: list[int], count: int, seed: int) -> list[int]:
    found = list(prompt)
    for made in range(count):
        found.append(next_token(found, seed, made))
    return found[len(prompt) :]


class Engine:
    """A replica that continues whatever it was sent."""

    def __init__(self) -> None:
        self.streams: dict[int, dict[str, Any]] = {}
        self.seen_starts: set[int] = set()

    def take(self, fleet: CoreFleet, replica: Endpoint) -> None:
        link = fleet.link(replica)
        for slot, request in list(link.started.items()):
            seed = request.sampling.seed if request.sampling.HasField("seed") else 0
            self.streams[slot] = {
                "tokens": list(request.prompt),
                "left": request.sampling.max_tokens,
                "seed": seed,
                "made": 0,
            }
            del link.started[slot]
        for slot in link.cancelled:
            if self.streams.pop(slot, None) is not None:
                fleet.frame(replica, finish=[tokens_pb2.Finish(stream=slot, reason=CANCELLED)])
        link.cancelled.clear()

    def step(self, fleet: CoreFleet, replica: Endpoint, rng: random.Random) -> None:
        moved = [slot for slot in self.streams if rng.random() < 0.7]
        frame = tokens_pb2.Frame()
        for slot in moved:
            stream = self.streams[slot]
            run = min(stream["left"], rng.choice([1, 1, 1, 2, 5]))
            frame.stream.append(slot)
            frame.count.append(run)
            for _ in range(run):
                token = next_token(stream["tokens"], stream["seed"], stream["made"])
                stream["tokens"].append(token)
                stream["made"] += 1
                frame.token.append(token)
            stream["left"] -= run
            if not stream["left"]:
                frame.finish.add(stream=slot, reason=tokens_pb2.FINISH_REASON_LENGTH, generated_tokens=stream["made"])
                del self.streams[slot]
        if moved:
            fleet.frame(replica, stream=frame.stream, count=frame.count, token=frame.token, finish=frame.finish)


@pytest.mark.parametrize("seed", range(25))
def test_every_stream_is_the_undisturbed_one(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    fleet = CoreFleet(
        replicas=4, max_running=6, resume={"max_resumes": 1000, "wait_s": 1e6}, breaker={"failures": 10**6}
    )
    engines = {replica.index: Engine() for replica in fleet.replicas}
    requests: list[tuple[Request, list[int], int, int]] = []
    cancelled: set[int] = set()
    for turn in range(200):
        if turn < 120 and rng.random() < 0.5:
            prompt = [rng.randrange(50_000) for _ in range(rng.randrange(1, 5))]
            count, own_seed = rng.randrange(1, 60), rng.choice([0, 0, 7])
            extra = {"seed": own_seed, "temperature": 1.0} if own_seed else {}
            delivery = rng.choice([0, 0, 0, 1, 2])
            request = fleet.submit(
                prompt=tuple(prompt), max_tokens=count, delivery=delivery, max_delay_ms=50, **extra
            )  # fmt: skip
            requests.append((request, prompt, count, own_seed))
        if turn < 150 and rng.random() < 0.1:
            replica = rng.choice(fleet.replicas)
            # One that is lost in a lone try condemns the request, see test_router_poison: chance must not do that here.
            if replica.connected and replica.trial is None:
                fleet.lose(replica)
                engines[replica.index] = Engine()
        for replica in fleet.replicas:
            if not replica.connected and rng.random() < 0.3:
                fleet.connect(replica)
            if replica.connected:
                engines[replica.index].take(fleet, replica)
                engines[replica.index].step(fleet, replica, rng)
        if requests and rng.random() < 0.05:
            request = rng.choice(requests)[0]
            if request.state is not RequestState.FINISHED:
                fleet.cancel(request)
                cancelled.add(request.stream)
        fleet.tick(0.02)
        assert fleet.state.live == sum(request.state is not RequestState.FINISHED for request, *_ in requests)
    for _ in range(2000):
        for replica in fleet.replicas:
            if not replica.connected:
                fleet.connect(replica)
            engines[replica.index].take(fleet, replica)
            engines[replica.index].step(fleet, replica, rng)
        fleet.tick(0.02)
        if not fleet.state.live:
            break
    for request, prompt, count, own_seed in requests:
        end = fleet.end(request)
        assert end is not None, request
        received = fleet.received(request)
        expected = undisturbed(prompt, count, own_seed)
        if request.stream in cancelled:
            assert received == expected[: len(received)]
        else:
            assert end.reason == tokens_pb2.FINISH_REASON_LENGTH, end
            assert received == expected
            assert end.generated_tokens == count
    fleet.check_idle()
    for replica in fleet.replicas:
        engines[replica.index].take(fleet, replica)
    assert fleet.state.slots.taken == 0
    fleet.state.pages._reclaim()
    assert fleet.state.pages.pages_in_use == 0
