"""The first token of an attempt: the prompt is through, so nobody suspects the request or its replica any more.

Called where tokens come (tokens, direct) and where a request ends well without one (finishes).
"""

from __future__ import annotations

from megatoken.router.core.accounts import prefilled
from megatoken.router.core.request import Request
from megatoken.router.core.state import RouterState


def first_token(state: RouterState, request: Request, now: float) -> None:
    """The first token of this attempt: its prompt is through, and its replica works."""
    if request.first_on_replica or request.replica is None:
        return
    request.first_on_replica = True
    request.suspected_of = ""
    replica = request.replica
    if replica.trial is request:
        replica.trial = None
    prefilled(request, replica)
    state.ledger.add("prompt_tokens", request.prompt_tokens + request.base_tokens)
    request.pool.measures.prompt_tokens += request.prompt_tokens + request.base_tokens
    was_closed = replica.circuit.failures == 0
    replica.circuit.succeeded()
    if not was_closed:
        state.fleet.refresh(replica, now)
    if not request.first_s:
        request.first_s = now
        state.latencies.first_token.add(now - request.arrived_s, now)
        request.pool.measures.first_token_s.observe(now - request.arrived_s)
