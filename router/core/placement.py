"""Gives waiting requests a replica: fair queue -> policy -> slot -> the worker's session. Suspects get one apart."""

from __future__ import annotations

import numpy as np

from megatoken.router.core import quarantine
from megatoken.router.core.accounts import charge, occupy, uncharge
from megatoken.router.core.ending import LENGTH, end, fail
from megatoken.router.core.lifecycle import RequestEvent
from megatoken.router.core.request import Request
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint, Pool
from megatoken.router.fleet.prefix_index import cached_tokens
from megatoken.router.fleet.routing_request import RoutingRequest
from megatoken.router.streams.slots import DIRECT
from megatoken.tokens import continuation
from megatoken.tokens.frames import U32
from megatoken.v1 import tokens_pb2


def routing_request(request: Request) -> RoutingRequest:
    return RoutingRequest(
        request.prompt_tokens,
        request.expected_tokens,
        request.affinity,
        request.lora,
        request.site,
        request.prefix_hashes,
        frozenset(request.tried),
    )


def place_waiting(state: RouterState, pool: Pool, now: float) -> None:
    """Places as many waiting requests of the model as there is room for.

    Called wherever room may have come, by code that has others to serve as well: a fault of ours ends here, and those
    that wait are tried again at the next tick at the latest.
    """
    try:
        _place_all(state, pool, now)
    except Exception as error:
        state.faults.caught("placement", error)


def _place_all(state: RouterState, pool: Pool, now: float) -> None:
    if pool.queue.suspects or pool.has_wards:
        _try_suspects(state, pool, now)
    while pool.queue.length and pool.open:
        request = pool.queue.peek()
        if request is None:
            return
        try:
            replica = pool.policy.choose(pool, routing_request(request), state.rng)
            if replica is None:
                return
        except Exception as error:  # it would stand before all others for good
            fail(state, request, "choice", error, now)
            continue
        try:
            pool.queue.pop()
            place(state, request, replica, now)
        except Exception as error:
            fail(state, request, "placement", error, now)


def _try_suspects(state: RouterState, pool: Pool, now: float) -> None:
    """Sends each ward its next suspect; without suspects there are no wards."""
    if pool.queue.suspects:
        pool.has_wards = True
        for replica in quarantine.wards(state, pool, now):
            if not pool.queue.suspects:
                break
            request = pool.queue.pop_suspect()
            replica.trial = request
            try:
                place(state, request, replica, now)
            except Exception as error:
                replica.trial = None
                fail(state, request, "placement", error, now)
        return
    for replica in pool.replicas:
        quarantine.close(state, replica, now)
    pool.has_wards = any(replica.ward for replica in pool.replicas)


def place(state: RouterState, request: Request, replica: Endpoint, now: float) -> None:
    """Sends the request to the replica. It is in no queue."""
    request.move(RequestEvent.PLACED)
    if replica.link is None:
        raise RuntimeError(f"replica {replica.name} is in the open list without a session")
    request.attempts += 1
    raw, base = request.raw, 0
    if request.carried and not request.replay:
        if len(request.carried) // 4 >= request.max_tokens:  # only its Finish was lost
            end(state, request, tokens_pb2.Finish(reason=LENGTH, replica=replica.name), now)
            return
        raw, base = continuation.prefix_request(request.raw, request.carried), len(request.carried) // 4
    direct = request.attempts > 1 or request.delivery or request.sink_index < 0
    sink = DIRECT if direct else request.sink_index
    carried = request.carried
    slot = state.slots.take(replica.index, sink, request.stream, request, now)
    request.slot = slot
    occupy(request, replica)
    try:
        _begin_attempt(state, request, replica, base, now)
        replica.link.send_start(slot, raw)
    except Exception:  # its worker never heard of it, so nobody would confirm its end
        uncharge(state, request, now)
        state.pages.free(slot)
        state.slots.free(slot)
        request.slot, request.carried, request.replayed = -1, carried, b""
        raise
    try:
        request.pool.measures.queue_s.observe(now - request.arrived_s)
    except Exception as error:
        state.faults.caught("accounts", error)
    state.fleet.refresh(replica, now)


def _begin_attempt(state: RouterState, request: Request, replica: Endpoint, base: int, now: float) -> None:
    """What replica and slot hold of the request from now on. `base`: tokens of `carried` that it goes on from."""
    slot = request.slot
    if base:
        state.pages.append_run(slot, 0, np.frombuffer(request.carried, U32))
        state.slots.generated[slot] = request.base_tokens = base
    elif request.carried:
        request.replayed, request.replay_at = request.carried, 0
    request.carried = b""
    request.placed_s = now
    request.first_on_replica = False
    request.prompt_rows_here = 0
    prompt_tokens = request.prompt_tokens + base
    if request.prefix_hashes:
        prompt_tokens -= min(cached_tokens(replica, request.prefix_hashes), request.prompt_tokens - 1)
    charge(request, replica, prompt_tokens, max(1, request.expected_tokens - base), now)
    if request.prefix_hashes:
        request.pool.prefixes.record(replica, request.prefix_hashes)
