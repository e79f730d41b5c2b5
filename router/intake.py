"""A worker's frame arrives: tokens to their clients, details and finishes to their requests, load to the table."""

from __future__ import annotations

import heapq

import numpy as np
from google.protobuf.message import DecodeError

from megatoken.frames import MalformedFrame, token_columns
from megatoken.v1 import tokens_pb2
from megatoken.v1.frame_columns_pb2 import Frame
from router import continuation
from router.demux import Sorted, sort_frame
from router.ending import CANCELLED, ERROR, end, settle, uncharge
from router.fleet import Replica
from router.load import take_load
from router.outbox import Part
from router.placement import pump
from router.recovery import lose
from router.request import Request
from router.state import RouterState

_EACH, _COALESCE = 0, 1  # tokens.proto, Delivery
_SAMPLE_EVERY = 16  # frames whose times between tokens are measured
# What a worker says when it, and not the request, is at fault: gRPC UNKNOWN, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE.
_FULL = 8
_FAULTS = frozenset((2, 13, 14))


def on_frame(state: RouterState, replica: Replica, raw: bytes, now: float) -> None:
    """Takes one encoded Frame in. Raises MalformedFrame when the worker's session must be given up."""
    try:
        frame = Frame.FromString(raw)
    except DecodeError:
        raise MalformedFrame(f"{len(raw)} bytes that are not a Frame") from None
    details = _details(state, replica, frame) if frame.detail else {}
    if frame.token or frame.stream:
        _take_tokens(state, replica, frame, details, now)
    replica.last_frame_s = now
    if frame.finish:
        for finish in frame.finish:
            _take_finish(state, replica, finish, now)
        state.fleet.refresh(replica, now)
        pump(state, replica.pool, now)
    if frame.HasField("load"):
        take_load(state, replica, frame.load, now)


def _take_tokens(
    state: RouterState, replica: Replica, frame: Frame, details: dict[int, list[bytes]], now: float
) -> None:
    stream, count, token = token_columns(frame)
    if not len(stream):
        return
    replica.frames += 1
    if replica.frames % _SAMPLE_EVERY == 0:
        _sample_times(state, replica, stream, now)
    found = sort_frame(state.slots, state.pages, replica.index, stream, count, token, now)
    replica.generated_tokens += found.tokens
    replica.decode_outstanding -= found.live
    state.ledger.add("generated_tokens", found.tokens)
    replica.pool.measures.generated_tokens += found.tokens
    state.ledger.foreign_tokens += found.foreign
    urgent = _first_tokens(state, found, now) if found.first else ()
    for index, streams, counts, tokens in found.parts:
        sink = state.sinks[index]
        if sink is None:
            continue
        state.ledger.delivered_tokens += len(tokens)
        sink.outbox.add_part(Part(streams, counts, tokens, _details_of(state, sink, details), []))
        if index in urgent:
            sink.outbox.urgent = True
        sink.wake()
    for slot, packed in found.direct:
        request = state.slots.owner[slot]
        if request is not None:
            _take_direct(state, request, packed, details.pop(slot, []), now)


def _sample_times(state: RouterState, replica: Replica, stream: np.ndarray, now: float) -> None:
    inside = stream[stream < state.slots.size]
    gaps = now - state.slots.last_s[inside[state.slots.generated[inside] > 0]]
    if len(gaps):
        state.latencies.between_tokens.add_many(gaps, now)
        replica.pool.measures.between_tokens_s.observe_many(gaps)


def _first_tokens(state: RouterState, found: Sorted, now: float) -> set[int]:
    """Marks requests whose first token this is; returns the sessions that must not wait for it."""
    urgent: set[int] = set()
    for slot in found.first:
        request: Request | None = state.slots.owner[slot]
        if request is not None:
            first_token(state, request, now)
            urgent.add(request.sink_index)
    return urgent


def first_token(state: RouterState, request: Request, now: float) -> None:
    """The first token of this attempt: its prompt is through, and its replica works."""
    if request.first_on_replica or request.replica is None:
        return
    request.first_on_replica = True
    replica = request.replica
    replica.prompt_outstanding -= request.charged_prompt
    state.ledger.add("prompt_tokens", request.charged_prompt)
    request.pool.measures.prompt_tokens += request.charged_prompt
    request.charged_prompt = 0
    was_closed = replica.circuit.failures == 0
    replica.circuit.succeeded()
    if not was_closed:
        state.fleet.refresh(replica, now)
    waited = now - request.placed_s
    replica.ttft_s = waited if replica.ttft_s == 0 else replica.ttft_s + 0.05 * (waited - replica.ttft_s)
    if not request.first_s:
        request.first_s = now
        state.latencies.first_token.add(now - request.arrived_s, now)
        request.pool.measures.first_token_s.observe(now - request.arrived_s)


def _take_direct(state: RouterState, request: Request, packed: bytes, details: list[bytes], now: float) -> None:
    """Tokens of a request that needs a look: Generate, the first of an attempt, a replay, held delivery."""
    first_token(state, request, now)
    if request.replayed:
        packed, details = _check_replay(state, request, packed, details, now)
        if not packed:
            return
    if request.delivery != _EACH:
        _hold(state, request, details, now)
        return
    if request.sink_index >= 0 and not request.replayed:
        state.slots.sink[request.slot] = request.sink_index  # from now on with all others
    state.ledger.delivered_tokens += len(packed) // 4
    request.sink.push_tokens(request, packed, details)


def _check_replay(
    state: RouterState, request: Request, packed: bytes, details: list[bytes], now: float
) -> tuple[bytes, list[bytes]]:
    """Swallows what the client has had already; what comes back is new. A difference ends the replay."""
    had = request.replayed[request.replay_at : request.replay_at + len(packed)]
    if packed[: len(had)] != had:
        request.resume_note = "the tokens made again differed from those sent"
        end(
            state,
            request,
            tokens_pb2.Finish(reason=ERROR, code=14, message=f"lost its replica; {request.resume_note}"),
            now,
        )
        return b"", []
    request.replay_at += len(had)
    if request.replay_at < len(request.replayed):
        return b"", []
    request.replayed = b""
    kept = []
    for raw in details:
        detail = tokens_pb2.Detail.FromString(raw)
        continuation.drop_rows(detail, len(had) // 4)
        if detail.logprobs.rank:
            kept.append(detail.SerializeToString())
    return packed[len(had) :], kept


def _hold(state: RouterState, request: Request, details: list[bytes], now: float) -> None:
    """Held delivery: the first token at once, the rest when due or at the end, read back from the history."""
    request.held_details += details
    if request.sent_tokens == 0:
        flush_held(state, request)
    elif request.delivery == _COALESCE and not request.hold_due:
        request.hold_due = True
        state.ordinal += 1
        heapq.heappush(state.holds, (now + request.max_delay_s, state.ordinal, request))


def flush_held(state: RouterState, request: Request) -> None:
    """Passes on what is held back for a request that a replica has."""
    total = int(state.slots.generated[request.slot])
    if total <= request.sent_tokens or request.replayed:
        return
    packed = state.pages.read(request.slot, request.sent_tokens, total).tobytes()
    state.ledger.delivered_tokens += total - request.sent_tokens
    request.sent_tokens = total
    details, request.held_details = request.held_details, []
    request.sink.push_tokens(request, packed, details)


def _details(state: RouterState, replica: Replica, frame: Frame) -> dict[int, list[bytes]]:
    """Details by slot, with the client's stream numbers; those of zombies are dropped."""
    found: dict[int, list[bytes]] = {}
    for detail in frame.detail:
        slot = detail.stream
        if slot >= state.slots.size or int(state.slots.replica[slot]) != replica.index:
            continue
        if state.slots.owner[slot] is not None:
            detail.stream = int(state.slots.stream[slot])
            found.setdefault(slot, []).append(detail.SerializeToString())
    return found


def _details_of(state: RouterState, sink: object, details: dict[int, list[bytes]]) -> list[bytes]:
    if not details:
        return []
    mine = [slot for slot in details if state.slots.owner[slot].sink is sink]
    return [raw for slot in mine for raw in details.pop(slot)]


def _take_finish(state: RouterState, replica: Replica, finish: tokens_pb2.Finish, now: float) -> None:
    slot = finish.stream
    if slot >= state.slots.size or int(state.slots.replica[slot]) != replica.index:
        return  # it ended twice, or never was
    request: Request | None = state.slots.owner[slot]
    if request is None:  # a zombie: cancelled, or gone on elsewhere
        state.slots.free(slot)
        return
    state.ledger.add("cached_tokens", finish.cached_tokens)
    request.pool.measures.cached_tokens += finish.cached_tokens
    if finish.reason == ERROR and finish.code in _FAULTS:
        replica.circuit.failed(now)
        lose(state, request, finish.message or f"replica {replica.name} failed it", now, known_to_worker=False)
        return
    if finish.reason == CANCELLED or (finish.reason == ERROR and finish.code == _FULL):
        lose(state, request, finish.message or f"replica {replica.name} let go of it", now, known_to_worker=False)
        return
    if not request.first_on_replica:
        first_token(state, request, now) if finish.reason != ERROR else replica.circuit.let_go()
    if request.delivery:
        flush_held(state, request)
    finish.generated_tokens = max(int(state.slots.generated[slot]), len(request.replayed) // 4)
    finish.replica = finish.replica or replica.name
    uncharge(state, request, now)
    state.pages.free(slot)
    state.slots.free(slot)
    request.slot = -1
    settle(state, request, finish, now)
