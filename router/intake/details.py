"""Details of tokens, log probabilities above all: whose they are, and on what way they go to the client.

With the session's columns, with a request's own tokens (direct takes those), or alone, when no token came beside them.
"""

from __future__ import annotations

from megatoken.router.core.prompt_rows import new_prompt_rows
from megatoken.router.core.request import Request
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.intake.direct import EACH
from megatoken.tokens.outbox import FramePart
from megatoken.v1.frame_columns_pb2 import Frame


def details_by_slot(state: RouterState, replica: Endpoint, frame: Frame) -> dict[int, list[bytes]]:
    """A frame's details by slot, with the client's stream numbers; those of orphans are dropped."""
    found: dict[int, list[bytes]] = {}
    for detail in frame.detail:
        slot = detail.stream
        if slot >= state.slots.size or int(state.slots.replica[slot]) != replica.index:
            continue
        request = state.slots.owner[slot]
        if request is not None:
            detail.stream = int(state.slots.stream[slot])
            if detail.prompt_logprobs.rank and not new_prompt_rows(request, detail):
                continue
            found.setdefault(slot, []).append(detail.SerializeToString())
    return found


def take_column_details(state: RouterState, sink_index: int, details: dict[int, list[bytes]]) -> list[bytes]:
    """Takes those of the slots whose tokens go to the session as columns; DIRECT slots get theirs with their tokens."""
    if not details:
        return []
    mine = [slot for slot in details if int(state.slots.sink[slot]) == sink_index]
    return [raw for slot in mine for raw in details.pop(slot)]


def take_lone_details(state: RouterState, request: Request, details: list[bytes]) -> None:
    """Details of a stream that had no token in the frame, as a prompt's that are sent ahead in pieces."""
    if request.replayed:  # the client has had them
        return
    if request.delivery != EACH:
        request.held_details += details
    elif request.sink_index < 0:
        request.sink.push_tokens(request, b"", details)
    else:
        sink = state.sinks[request.sink_index]
        if sink is not None:
            sink.outbox.add_part(FramePart(None, None, None, details, []))
            sink.wake()
