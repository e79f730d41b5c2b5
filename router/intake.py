"""A worker's frame arrives: tokens to their clients, details and finishes to their requests, load to the table.

A fault of ours while one part is taken in concerns that part alone. Nothing may be missing in the middle of a stream,
so what could not be taken ends: before a frame's tokens are recorded, with the session of its replica, whose requests
go on from what was recorded; after that, with the requests whose tokens they are. Each is counted in `state.faults`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from megatoken.frames import U32, Column, MalformedFrame, token_columns
from megatoken.v1 import tokens_pb2
from megatoken.v1.frame_columns_pb2 import Frame
from router import continuation
from router.demux import Index, Sorted, sort_frame
from router.ending import CANCELLED, ERROR, fail, settle, uncharge
from router.fleet import Pool, Replica
from router.held import flush_held
from router.load import take_load
from router.outbox import Part
from router.placement import pump
from router.recovery import lose, lose_replica
from router.request import Request
from router.state import RouterState

_EACH, _COALESCE = 0, 1  # tokens.proto, Delivery
_SAMPLE_EVERY = 64  # frames; of one call in about so many the times between tokens are measured
# What a worker says when it, and not the request, is at fault: gRPC UNKNOWN, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE.
_FULL = 8
_FAULTS = frozenset((2, 13, 14))


@dataclass(slots=True)
class _Arrived:
    """A decoded frame and who sent it."""

    replica: Replica
    frame: Frame
    stream: Column
    count: Column | None
    token: Column


def on_frame(state: RouterState, replica: Replica, raw: bytes, now: float) -> None:
    """Takes one encoded Frame in."""
    on_frames(state, [(replica, raw)], now)


def on_frames(state: RouterState, batch: list[tuple[Replica, bytes]], now: float) -> None:
    """Takes encoded Frames in, oldest first. The session of a worker that sends a malformed one ends with it.

    Frames of different replicas are sorted together, since numpy's cost is per call; a second frame of the same
    replica begins a new group, which keeps every stream's order.
    """
    at = 0
    while at < len(batch):
        group: list[_Arrived] = []
        senders: set[int] = set()
        while at < len(batch) and batch[at][0].index not in senders:
            replica, raw = batch[at]
            at += 1
            if not replica.connected:
                continue  # its session was given up in this very batch
            try:
                group.append(_decode(state, replica, raw))
                senders.add(replica.index)
            except MalformedFrame as error:
                give_up(state, replica, f"replica {replica.name} sent a malformed frame: {error}", now)
            except Exception as error:
                _fault(state, replica, "frame", error, now)
        try:
            _take_group(state, group, now)
        except Exception as error:  # beside what is caught there part by part; the frames after these are still to come
            for arrived in group:
                if arrived.replica.connected:
                    _fault(state, arrived.replica, "frame", error, now)


def _decode(state: RouterState, replica: Replica, raw: bytes) -> _Arrived:
    try:
        frame = Frame.FromString(raw)
    except DecodeError:
        raise MalformedFrame(f"{len(raw)} bytes that are not a Frame") from None
    stream, count, token = token_columns(frame)
    if len(stream) and int(stream.max()) >= state.slots.size:
        raise MalformedFrame(f"stream {int(stream.max())}, but there are {state.slots.size}")
    return _Arrived(replica, frame, stream, count, token)


def give_up(state: RouterState, replica: Replica, why: str, now: float) -> None:
    """Ends the replica's session here and now: a frame of it is missing, so no later one may be taken in.

    Its requests go on from the tokens that were recorded before; the link hears of it and opens a new session.
    """
    link = replica.link
    if link is not None:
        link.cut(why)
    lose_replica(state, replica, why, now)


def _fault(state: RouterState, replica: Replica, where: str, error: Exception, now: float) -> None:
    """A frame of the replica, or a part of one, could not be taken in: counted, and its session ends."""
    state.faults.caught(where, error)
    give_up(state, replica, f"a frame of replica {replica.name} could not be taken in ({type(error).__name__})", now)


def _take_group(state: RouterState, group: list[_Arrived], now: float) -> None:
    """Frames of different replicas: tokens first, then what ended, then loads."""
    details: dict[int, list[bytes]] = {}
    filled = []
    for arrived in group:
        if arrived.frame.detail:
            try:
                details |= _details(state, arrived.replica, arrived.frame)
            except Exception as error:
                _fault(state, arrived.replica, "details", error, now)
                continue
        if len(arrived.stream):
            filled.append(arrived)
            arrived.replica.alive_s = now  # tokens are made by steps; ends and loads come from the worker as well
    if filled:
        _take_tokens(state, filled, details, now)
    for slot, lone in details.items():
        request = state.slots.owner[slot]
        if request is not None:
            try:
                _take_lone_details(state, request, lone)
            except Exception as error:
                fail(state, request, "delivery", error, now)
    pools: dict[int, Pool] = {}
    for arrived in group:
        replica, frame = arrived.replica, arrived.frame
        if not replica.connected:  # given up above
            continue
        if replica.ward:  # a first token may have made place for the next suspect
            pools[id(replica.pool)] = replica.pool
        if frame.finish:
            for finish in frame.finish:
                _take_finish(state, replica, finish, now)
            pools[id(replica.pool)] = replica.pool
        if frame.usage and state.on_lease_usage is not None:
            try:
                for usage in frame.usage:
                    state.on_lease_usage(replica, usage, now)
            except Exception as error:  # without its report a lease stays charged in full
                state.faults.caught("leases", error)
            pools[id(replica.pool)] = replica.pool
        if frame.HasField("load"):
            try:
                take_load(state, replica, frame.load, now)
            except Exception as error:  # the next report says it all again
                state.faults.caught("load", error)
            pools[id(replica.pool)] = replica.pool
    for pool in pools.values():
        pump(state, pool, now)


def _take_tokens(state: RouterState, frames: list[_Arrived], details: dict[int, list[bytes]], now: float) -> None:
    state.frames += len(frames)
    try:
        if state.frames % _SAMPLE_EVERY < len(frames):
            _sample_times(state, frames[0], now)
        stream, count, token, sender = _joined(frames)
        found = sort_frame(state.slots, state.pages, sender, stream, count, token, now)
    except Exception as error:  # nothing is recorded, see sort_frame; whose fault it is, each frame by itself shows
        if len(frames) == 1:
            _fault(state, frames[0].replica, "tokens", error, now)
        else:
            for arrived in frames:
                if arrived.replica.connected:
                    _take_tokens(state, [arrived], details, now)
        return
    try:
        _account(state, frames, found, len(stream))
    except Exception as error:  # a count may be off, no stream is
        state.faults.caught("accounts", error)
    urgent: set[int] = set()
    try:
        if found.first:
            urgent = _first_tokens(state, found, now)
    except Exception as error:
        state.faults.caught("accounts", error)
    for index, streams, counts, tokens in found.parts:
        sink = state.sinks[index]
        if sink is None:
            continue
        try:
            sink.outbox.add_part(Part(streams, counts, tokens, _details_of(state, index, details), []))
            state.ledger.delivered_tokens += len(tokens)
            if index in urgent:
                sink.outbox.urgent = True
            sink.wake()
        except Exception as error:
            for number in dict.fromkeys(streams.tolist()):
                if number in sink.requests:
                    fail(state, sink.requests[number], "delivery", error, now)
    for slot, packed in found.direct:
        request = state.slots.owner[slot]
        if request is not None:
            try:
                _take_direct(state, request, packed, details.pop(slot, []), now)
            except Exception as error:
                fail(state, request, "delivery", error, now)


def _joined(frames: list[_Arrived]) -> tuple[Column, Column | None, Column, int | Index]:
    """The columns of several frames as one, and who sent each entry."""
    first = frames[0]
    if len(frames) == 1:
        return first.stream, first.count, first.token, first.replica.index
    count: Column | None = None
    if any(arrived.count is not None for arrived in frames):
        ones = [np.ones(len(a.stream), U32) if a.count is None else a.count for a in frames]
        count = np.concatenate(ones)
    return (
        np.concatenate([arrived.stream for arrived in frames]),
        count,
        np.concatenate([arrived.token for arrived in frames]),
        np.repeat([arrived.replica.index for arrived in frames], [len(arrived.stream) for arrived in frames]),
    )


def _account(state: RouterState, frames: list[_Arrived], found: Sorted, entries: int) -> None:
    """Counts what came: for the ledger, and off each replica's outstanding tokens."""
    state.ledger.add("generated_tokens", found.tokens)
    state.ledger.foreign_tokens += found.foreign
    if len(found.slots) == entries:  # no zombie, nothing foreign: each frame's own length is right
        for arrived in frames:
            _count(arrived.replica, len(arrived.token), len(arrived.token))
        return
    size = len(state.fleet.replicas)
    live = np.bincount(state.slots.replica[found.slots], weights=found.counts, minlength=size)
    for arrived in frames:
        own = state.slots.replica[arrived.stream.astype(np.intp)] == arrived.replica.index
        made = int(own.sum() if arrived.count is None else arrived.count[own].sum())
        _count(arrived.replica, made, int(live[arrived.replica.index]))


def _count(replica: Replica, made: int, live: int) -> None:
    replica.generated_tokens += made
    replica.pool.measures.generated_tokens += made
    replica.decode_outstanding -= live


def _sample_times(state: RouterState, arrived: _Arrived, now: float) -> None:
    """Before the frame is sorted, which sets the times anew."""
    stream = arrived.stream
    try:
        gaps = now - state.slots.last_s[stream[state.slots.generated[stream] > 0]]
        if len(gaps):
            arrived.replica.pool.measures.between_tokens_s.observe_many(gaps)
            state.latencies.between_tokens.add_many(gaps, now)
    except Exception as error:
        state.faults.caught("accounts", error)


def _first_tokens(state: RouterState, found: Sorted, now: float) -> set[int]:
    """Marks requests whose first token this is; returns the sessions that must not wait for it."""
    urgent: set[int] = set()
    for slot in found.first:
        request: Request | None = state.slots.owner[slot]
        if request is not None:
            try:
                first_token(state, request, now)
            except Exception as error:  # a count may be off, no stream is
                state.faults.caught("accounts", error)
            urgent.add(request.sink_index)
    return urgent


def first_token(state: RouterState, request: Request, now: float) -> None:
    """The first token of this attempt: its prompt is through, and its replica works."""
    if request.first_on_replica or request.replica is None:
        return
    request.first_on_replica = True
    request.suspected_of = ""
    replica = request.replica
    if replica.trial is request:
        replica.trial = None
    replica.prompt_outstanding -= request.charged_prompt
    request.charged_prompt = 0
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
    """Swallows what the client has had already; what comes back is new.

    Where the tokens differ, the replay is given up: the request goes on from the tokens that the client has.
    """
    had = request.replayed[request.replay_at : request.replay_at + len(packed)]
    if packed[: len(had)] != had:
        request.replay = False
        request.resume_note = "seeded sampling restarted: the tokens made again differed from those sent"
        lose(state, request, request.resume_note, now, known_to_worker=True)
        return b"", []
    request.replay_at += len(had)
    if request.replay_at < len(request.replayed):
        return b"", []
    request.replayed = b""
    kept, old = [], len(had) // 4  # rows that the client has, of one detail after the other
    for raw in details:
        detail = tokens_pb2.Detail.FromString(raw)
        rows = len(detail.logprobs.rank)
        continuation.drop_rows(detail, min(old, rows))
        old -= min(old, rows)
        if detail.logprobs.rank:
            kept.append(detail.SerializeToString())
    return packed[len(had) :], kept


def _hold(state: RouterState, request: Request, details: list[bytes], now: float) -> None:
    """Held delivery: the first token at once, the rest when due or at the end."""
    request.held_details += details
    if request.sent_tokens == 0:
        flush_held(state, request)
    elif request.delivery == _COALESCE and not request.hold_due:
        request.hold_due = True
        state.holds.push(now + request.max_delay_s, request)


def _details(state: RouterState, replica: Replica, frame: Frame) -> dict[int, list[bytes]]:
    """Details by slot, with the client's stream numbers; those of zombies are dropped."""
    found: dict[int, list[bytes]] = {}
    for detail in frame.detail:
        slot = detail.stream
        if slot >= state.slots.size or int(state.slots.replica[slot]) != replica.index:
            continue
        request = state.slots.owner[slot]
        if request is not None:
            detail.stream = int(state.slots.stream[slot])
            if detail.prompt_logprobs.rank and not continuation.new_prompt_rows(request, detail):
                continue
            found.setdefault(slot, []).append(detail.SerializeToString())
    return found


def _details_of(state: RouterState, sink_index: int, details: dict[int, list[bytes]]) -> list[bytes]:
    """Takes those of the slots whose tokens go to the session as columns; DIRECT slots get theirs with their tokens."""
    if not details:
        return []
    mine = [slot for slot in details if int(state.slots.sink[slot]) == sink_index]
    return [raw for slot in mine for raw in details.pop(slot)]


def _take_lone_details(state: RouterState, request: Request, details: list[bytes]) -> None:
    """Details of a stream that had no token in the frame, as a prompt's that are sent ahead in pieces."""
    if request.replayed:  # the client has had them
        return
    if request.delivery != _EACH:
        request.held_details += details
    elif request.sink_index < 0:
        request.sink.push_tokens(request, b"", details)
    else:
        sink = state.sinks[request.sink_index]
        if sink is not None:
            sink.outbox.add_part(Part(None, None, None, details, []))
            sink.wake()


def _take_finish(state: RouterState, replica: Replica, finish: tokens_pb2.Finish, now: float) -> None:
    """Ends the request that the worker ended; one that cannot be ended so, ends with an error."""
    slot = finish.stream
    if slot >= state.slots.size or int(state.slots.replica[slot]) != replica.index:
        return  # it ended twice, or never was
    request: Request | None = state.slots.owner[slot]
    if request is None:  # a zombie: cancelled, or gone on elsewhere
        state.slots.free(slot)
        return
    try:
        _finish(state, replica, request, finish, now)
    except Exception as error:
        fail(state, request, "finish", error, now)
        if int(state.slots.replica[slot]) == replica.index and state.slots.owner[slot] is None:
            state.slots.free(slot)  # its worker has said that it ended, and will not say so again


def _finish(state: RouterState, replica: Replica, request: Request, finish: tokens_pb2.Finish, now: float) -> None:
    slot = request.slot
    state.ledger.add("cached_tokens", finish.cached_tokens)
    request.pool.measures.cached_tokens += finish.cached_tokens
    if finish.reason == ERROR and finish.code in _FAULTS:
        if finish.engine_dead:
            replica.circuit.trip(now)  # before any other end of it is read: nothing may be tried there
        else:
            replica.circuit.failed(now)
        why = finish.message or f"replica {replica.name} failed it"
        lose(state, request, why, now, known_to_worker=False, died=finish.engine_dead)
        return
    if finish.reason == CANCELLED or (finish.reason == ERROR and finish.code == _FULL):
        lose(state, request, finish.message or f"replica {replica.name} let go of it", now, known_to_worker=False)
        return
    if finish.reason != ERROR:
        first_token(state, request, now)
    if request.delivery:
        flush_held(state, request)
    finish.generated_tokens = max(int(state.slots.generated[slot]), len(request.replayed) // 4)
    finish.replica = finish.replica or replica.name
    uncharge(state, request, now)
    state.pages.free(slot)
    state.slots.free(slot)
    request.slot = -1
    settle(state, request, finish, now)
