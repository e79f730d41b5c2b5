"""A replica is lost, or lets a request go: the request goes on elsewhere where that is allowed, else it ends."""

from __future__ import annotations

from megatoken.errors import UnavailableError
from megatoken.router.core.accounts import uncharge
from megatoken.router.core.ending import end, error_finish, fail
from megatoken.router.core.lifecycle import RequestEvent, RequestState
from megatoken.router.core.placement import place_waiting
from megatoken.router.core.request import Request
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.circuit import CircuitState
from megatoken.router.fleet.fleet import Endpoint


def lose(
    state: RouterState, request: Request, reason: str, now: float, *, known_to_worker: bool, died: bool = False
) -> None:
    """The request's replica has it no more. Queues it for another one, first in line, or ends it with UNAVAILABLE.

    known_to_worker: the worker may still send for the slot (it was moved, not lost): it becomes an orphan.
    died: the replica died or hangs, for which the request may be the cause while it had no token there; see quarantine.
    """
    if request.state is not RequestState.RUNNING:
        return
    replica = request.replica
    guilty = ""
    if died and replica is not None and not request.first_on_replica:
        if replica.trial is request:
            guilty = _guilty(request, replica, reason)
        request.suspected_of = replica.name
    _take_back(state, request, now, known_to_worker)
    if replica is not None and replica.index not in request.tried:
        request.tried.append(replica.index)
    refusal = guilty or _refusal(state, request, reason, now)
    if refusal:
        finish = error_finish(request.stream, UnavailableError(refusal))
        if replica is not None:
            finish.replica = replica.name
        end(state, request, finish, now)
        return
    request.move(RequestEvent.LOST)
    if request.carried or request.attempts:
        request.resumes += bool(request.carried)
    if request.carried:
        state.ledger.resumes += 1
    request.pool.measures.moved(with_tokens=bool(request.carried), drained=known_to_worker)
    request.placed_s = now  # it waits from now on
    if request.suspected_of:
        request.pool.queue.push_suspect(request)
    else:
        request.pool.queue.push_front(request)
    place_waiting(state, request.pool, now)


def _take_back(state: RouterState, request: Request, now: float, known_to_worker: bool) -> None:
    """Keeps what was generated, and settles with the replica."""
    slot = request.slot
    # In the middle of a replay the client has what is to be made again, whatever came of it so far.
    carried = request.replayed or state.pages.read(slot, 0, int(state.slots.generated[slot])).tobytes()
    replica = uncharge(state, request, now)
    state.pages.free(slot)
    if known_to_worker and replica is not None and replica.link is not None:
        replica.link.send_cancel(slot)
        state.slots.orphan(slot, now)
    else:
        state.slots.free(slot)
    request.slot = -1
    request.carried = carried
    request.replayed, request.replay_at = b"", 0


def _guilty(request: Request, replica: Endpoint, reason: str) -> str:
    return (
        f"{reason}; replicas {request.suspected_of} and {replica.name} were both lost before this request's first "
        f"token, the second while it alone had none there: it is not tried again"
    )


def _refusal(state: RouterState, request: Request, reason: str, now: float) -> str:
    """Why the request cannot go on; empty when it can."""
    resume = state.config.resume
    if request.carried and not request.resume:
        return f"{reason}; resuming is off for this request"
    if request.attempts > resume.max_resumes:
        return f"{reason}; moved {request.attempts - 1} times already"
    if not state.retries.take(state.live, now):
        return f"{reason}; too many requests move already (retry budget)"
    if request.carried and request.pool.replicas and request.replay is False:
        context = request.pool.max_model_len
        if context and request.prompt_tokens + len(request.carried) // 4 >= context:
            return f"{reason}; no room is left in the context"
    return ""


def lose_replica(state: RouterState, replica: Endpoint, reason: str, now: float) -> None:
    """The session to the replica's worker is gone, and with it all that it had."""
    replica.connected = False
    replica.link = None
    replica.load_totals = None
    replica.others = 0
    replica.pool.prefixes.forget(replica)
    replica.ward = replica.cleared = False
    state.fleet.refresh(replica, now)
    had = [(slot, state.slots.owner[slot]) for slot in state.slots.of_replica(replica.index)]
    if any(owner is not None for _, owner in had) or replica.circuit.state is CircuitState.HALF_OPEN:
        replica.circuit.failed(now)
    died = not (replica.gone and replica.draining)  # one that was drained and removed did not
    for slot, request in had:
        if request is None:
            state.slots.free(slot)
        else:
            try:
                lose(state, request, reason, now, known_to_worker=False, died=died)
            except Exception as error:  # the others must not stay behind on a replica that is gone
                fail(state, request, "loss", error, now)
    if replica.gone:
        state.fleet.release(replica)


def give_up(state: RouterState, replica: Endpoint, why: str, now: float) -> None:
    """Ends the replica's session here and now: a frame of it is missing, so no later one may be taken in.

    Its requests go on from the tokens that were recorded before; the link hears of it and opens a new session.
    """
    link = replica.link
    if link is not None:
        link.cut(why)
    lose_replica(state, replica, why, now)


def frame_failed(state: RouterState, replica: Endpoint, where: str, error: Exception, now: float) -> None:
    """A frame of the replica, or a part of one, could not be taken in: counted, and its session ends."""
    state.faults.caught(where, error)
    give_up(state, replica, f"a frame of replica {replica.name} could not be taken in ({type(error).__name__})", now)


def probed(state: RouterState, replica: Endpoint, now: float, *, well: bool) -> None:
    """A probe of the replica is over. Without a verdict within its deadline it is not well."""
    if replica.circuit.state is not CircuitState.HALF_OPEN:  # something else decided meanwhile
        return
    if well:
        replica.circuit.succeeded()
    else:
        replica.circuit.failed(now)
    state.fleet.refresh(replica, now)
    place_waiting(state, replica.pool, now)


def connect(state: RouterState, replica: Endpoint, now: float) -> None:
    """The session to the replica's worker stands (replica.link is set)."""
    replica.connected = True
    replica.alive_s = now
    replica.engine_steps = -1
    state.fleet.refresh(replica, now)
    place_waiting(state, replica.pool, now)


def move_all(state: RouterState, replica: Endpoint, reason: str, now: float) -> None:
    """Moves what a draining replica still has; it stays connected until the moved streams are confirmed."""
    for slot in state.slots.of_replica(replica.index):
        request = state.slots.owner[slot]
        if request is not None:
            try:
                lose(state, request, reason, now, known_to_worker=True)
            except Exception as error:
                fail(state, request, "loss", error, now)
