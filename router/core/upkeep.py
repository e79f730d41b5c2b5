"""What time alone brings about: deadlines, waits that are too long, hung replicas, drain deadlines, held tokens."""

from __future__ import annotations

from typing import Final

from megatoken.errors import DeadlineError, MegatokenError, UnavailableError
from megatoken.router.core.ending import end, error_finish, fail
from megatoken.router.core.held import flush_held
from megatoken.router.core.lifecycle import RequestState
from megatoken.router.core.placement import place_waiting
from megatoken.router.core.recovery import move_all
from megatoken.router.core.request import Request
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.fleet.outliers import slow_replicas

ORPHAN_S: Final = 120.0  # an engine aborts within a step; a step that includes a long prefill takes seconds


def flush_due(state: RouterState, now: float) -> None:
    """Passes on coalesced tokens whose delay is over. Called every few milliseconds while any is held."""
    for request in state.holds.pop_until(now):
        request.hold_due = False
        try:
            flush_held(state, request)
        except Exception as error:
            fail(state, request, "delivery", error, now)


def tick(state: RouterState, now: float, unix_s: float) -> None:
    """Called about ten times a second. A fault in what one replica, model or request needs keeps no other waiting."""
    _deadlines(state, now)
    for replica in state.fleet.live():
        try:
            _watch(state, replica, now, unix_s)
        except Exception as error:
            state.faults.caught("upkeep", error)
    for pool in state.fleet.pools.values():
        try:
            pool.gauge()
            place_waiting(state, pool, now)
        except Exception as error:
            state.faults.caught("upkeep", error)
    _waits(state, now)


def _watch(state: RouterState, replica: Endpoint, now: float, unix_s: float) -> None:
    """Moves what a drained replica still has at its deadline, cuts off a hung one, probes one whose pause is over."""
    if replica.draining and 0 < replica.member.drain_deadline_unix_s <= unix_s and replica.in_flight:
        move_all(state, replica, f"replica {replica.name} was drained", now)
    still_s = now - replica.alive_s
    if replica.connected and replica.in_flight and still_s > state.config.resume.hang_s:
        if replica.link is not None:
            replica.circuit.trip(now)
            replica.link.cut(f"the engine of replica {replica.name} hangs: no step for {still_s:.1f} s")
        return
    if replica.connected and replica.link is not None and replica.circuit.begin_probe(now):
        replica.link.probe()
    state.fleet.refresh(replica, now)


def slow_tick(state: RouterState, now: float) -> None:
    """Called about once a second: leaves out replicas much slower than their kind, and those that confirm no end."""
    for index in set(state.slots.replica[state.slots.orphans(now - ORPHAN_S)].tolist()):
        replica = state.fleet.replicas[index]
        if replica is not None and replica.link is not None:
            replica.link.cut(f"it did not confirm the end of a cancelled stream within {ORPHAN_S:.0f} s")
    for pool in state.fleet.pools.values():
        for replica in slow_replicas(pool, state.config.breaker, now):
            replica.ejected_until_s = now + state.config.breaker.max_open_s
            replica.step_s, replica.steps = 0.0, 0  # judged anew afterwards
            state.fleet.refresh(replica, now)


def _deadlines(state: RouterState, now: float) -> None:
    for request in state.deadlines.pop_until(now):
        late_s = now - request.arrived_s
        _end(state, request, DeadlineError(f"not done after {late_s:.3f} s, its deadline"), now)
        place_waiting(state, request.pool, now)


def _waits(state: RouterState, now: float) -> None:
    """Ends what waited too long: for its first replica, or for another one."""
    for pool in state.fleet.pools.values():
        if not pool.queue.length:
            continue
        serving = any(replica.connected for replica in pool.replicas)
        for request in pool.queue.items():
            since = request.placed_s if request.state is RequestState.RESUMING else request.arrived_s
            bound = state.config.admission.max_queue_s
            if request.state is RequestState.RESUMING or not serving:
                bound = state.config.resume.wait_s
            if not serving:  # where asking makes a replica start, a start is waited for
                bound = max(bound, pool.hold_s)
            if now - since > bound:
                why = pool.blocked or "no replica had room"
                text = f"waited {now - since:.1f} s for a replica of {pool.model!r}: {why}"
                if request.suspected_of:
                    text = (
                        f"replica {request.suspected_of} was lost before this request's first token, and for "
                        f"{now - since:.1f} s no replica of {pool.model!r} could try it where it alone is to blame"
                    )
                _end(state, request, UnavailableError(text), now)


def _end(state: RouterState, request: Request, error: MegatokenError, now: float) -> None:
    try:
        end(state, request, error_finish(0, error), now)
    except Exception as fault:  # it would wait for ever: nothing else looks at it again
        fail(state, request, "end", fault, now)
