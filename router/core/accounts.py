"""What replicas are charged: their places, and the tokens that are outstanding there. The only writer of these numbers.

A request in flight and a lease take a place each. An attempt is charged its prompt until its first token, and the
tokens it is expected to make until it leaves; each token that comes takes one off. When a place is free again, the
replica may be open again: that is seen to here.
"""

from __future__ import annotations

from megatoken.router.core.request import Request
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint


def occupy(request: Request, replica: Endpoint) -> None:
    """The request has a place on the replica; nothing is charged yet."""
    request.replica = replica
    request.base_tokens = request.charged_prompt = request.charged_decode = 0
    replica.in_flight += 1


def charge(request: Request, replica: Endpoint, prompt_tokens: int, decode_tokens: int, now: float) -> None:
    """Tokens to be read and expected to be made in this attempt. The first request of an idle replica wakes it."""
    request.charged_prompt, request.charged_decode = prompt_tokens, decode_tokens
    replica.prompt_outstanding += prompt_tokens
    replica.decode_outstanding += decode_tokens
    if replica.in_flight == 1:
        replica.alive_s = now


def prefilled(request: Request, replica: Endpoint) -> None:
    """The attempt's first token came: its prompt is outstanding no more."""
    replica.prompt_outstanding -= request.charged_prompt
    request.charged_prompt = 0


def credit(replica: Endpoint, tokens: int) -> None:
    """Tokens of requests in flight came."""
    replica.decode_outstanding -= tokens


def uncharge(state: RouterState, request: Request, now: float) -> Endpoint | None:
    """The request leaves its replica, which is returned. The slot is the caller's to free or to orphan."""
    replica = request.replica
    if replica is None:
        return None
    made = int(state.slots.generated[request.slot]) - request.base_tokens
    replica.in_flight -= 1
    request.replica = None
    if replica.trial is request:  # every way off a replica leads through here
        replica.trial = None
    prompt_tokens, decode_tokens = request.charged_prompt, request.charged_decode - made
    request.charged_prompt = request.charged_decode = 0
    _take_off(state, replica, prompt_tokens, decode_tokens, now)
    return replica


def charge_lease(state: RouterState, replica: Endpoint, prompt_tokens: int, decode_tokens: int, now: float) -> None:
    """A lease has a place on the replica, and is charged in full until it is given back."""
    replica.leased += 1
    replica.prompt_outstanding += prompt_tokens
    replica.decode_outstanding += decode_tokens
    state.fleet.refresh(replica, now)


def uncharge_lease(state: RouterState, replica: Endpoint, prompt_tokens: int, decode_tokens: int, now: float) -> None:
    """Takes back what charge_lease charged."""
    replica.leased -= 1
    _take_off(state, replica, prompt_tokens, decode_tokens, now)


def _take_off(state: RouterState, replica: Endpoint, prompt_tokens: int, decode_tokens: int, now: float) -> None:
    replica.prompt_outstanding -= prompt_tokens
    replica.decode_outstanding -= decode_tokens
    if replica.in_flight + replica.leased == 0:  # rounding and guesses end here
        replica.prompt_outstanding = replica.decode_outstanding = 0.0
    state.fleet.refresh(replica, now)
