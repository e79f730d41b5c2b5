"""A request arrives: checked, admitted, queued and, as a rule, placed at once."""

from __future__ import annotations

from collections.abc import Callable

from megatoken.errors import DrainingError, MegatokenError, RequestError, UnavailableError
from megatoken.router.admission import admission
from megatoken.router.admission.validation import check_priority, check_request, pool_of
from megatoken.router.core.ending import CANCELLED, end, fail
from megatoken.router.core.lifecycle import RequestState
from megatoken.router.core.placement import place_waiting
from megatoken.router.core.request import Request, Sink
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.prefix_index import block_hashes
from megatoken.router.identity.callers import Caller
from megatoken.tokens import continuation
from megatoken.v1 import tokens_pb2
from megatoken.v1.frame_columns_pb2 import GenerateRequest

_RESUME_OFF = 2  # tokens.proto, Resume


def submit(
    state: RouterState,
    sink: Sink,
    sink_index: int,
    stream: int,
    message: GenerateRequest,
    caller: Caller,
    deadline_s: float,
    now: float,
    own: Callable[[list[Request]], None] | None = None,
) -> list[Request]:
    """Takes a request on; returns one Request a choice. Raises a MegatokenError when it may not enter.

    `own` gets the requests before any answer can come.

    `message` is the caller's no more: it is changed here. `deadline_s` is monotonic; inf: none. Answers come through
    `sink`, possibly before this returns. Who may not enter is charged nothing. A fault of ours is counted, and raises
    UnavailableError.
    """
    try:
        requests = _admit(state, sink, sink_index, stream, message, caller, deadline_s, now, own)
    except RequestError:
        raise
    except MegatokenError:
        state.ledger.refused += 1
        raise
    except Exception as error:
        state.faults.caught("submission", error)
        raise UnavailableError(f"internal error ({type(error).__name__})") from error
    for request in requests:
        state.live += 1
        state.live_bytes += len(request.raw)
        if request.delivery:
            state.held += 1
            if state.on_held is not None:
                state.on_held()
        try:
            state.retries.started(now)
            state.ledger.add("requests_started")
            request.pool.measures.started += 1
            if deadline_s != float("inf"):
                state.deadlines.push(deadline_s, request)
            request.pool.queue.push(request, 1.0 if request.caller.key is None else request.caller.key.weight)
        except Exception as error:  # its caller is charged, and nothing else would ever look at it again
            fail(state, request, "submission", error, now)
    place_waiting(state, requests[0].pool, now)
    return requests


def _admit(
    state: RouterState,
    sink: Sink,
    sink_index: int,
    stream: int,
    message: GenerateRequest,
    caller: Caller,
    deadline_s: float,
    now: float,
    own: Callable[[list[Request]], None] | None,
) -> list[Request]:
    """Charges the caller last of all, so that nothing that fails on the way has to be given back."""
    if state.draining:
        raise DrainingError("the router is draining; open a new session")
    caller = state.callers.admit(caller, message.model)
    pool = pool_of(state.fleet, message.model)
    prompt_tokens, max_tokens = check_request(message, pool, state.config.limits)
    check_priority(message, caller.highest_priority)
    choices = max(1, message.sampling.n)
    size_bytes = message.ByteSize()
    expected = pool.expected_output(max_tokens)
    cost = (prompt_tokens + expected) * choices
    pool.arrived(prompt_tokens, expected, choices)
    refused = admission.refusal(
        pool, cost, choices, prompt_tokens, state.live + choices - 1, deadline_s - now, state.config.admission
    ) or admission.no_memory(pool, state.live_bytes, size_bytes * choices, state.config.admission)
    if refused is not None:
        raise refused
    if not message.request_id:
        state.ordinal += 1
        message.request_id = f"{state.config.router}-{state.ordinal:x}"
    hashes = block_hashes(message.prompt, message.cache_salt + message.lora) if pool.policy.wants_prefix else ()
    replay = continuation.needs_replay(message.sampling)
    delivery, delay_s = message.delivery, message.max_delay_ms / 1000
    message.ClearField("delivery")  # holding back is the router's part
    message.ClearField("max_delay_ms")
    resume = state.config.resume.enabled if not message.resume else message.resume != _RESUME_OFF
    parent = message.traceparent
    requests = []
    for choice in range(choices):
        message.traceparent = parent
        span = state.on_entered(message, now) if state.on_entered is not None else None
        request = Request(
            request_id=message.request_id,
            sink=sink,
            sink_index=sink_index,
            stream=stream + choice,
            choice=choice,
            pool=pool,
            raw=_choice_bytes(message, choice, choices),
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            expected_tokens=expected,
            priority=message.priority,
            caller=caller,
            affinity=message.affinity,
            lora=message.lora,
            site=message.site,
            resume=resume,
            replay=replay,
            delivery=delivery,
            max_delay_s=delay_s,
            deadline_s=deadline_s,
            arrived_s=now,
            prefix_hashes=hashes,
            span=span,
        )
        requests.append(request)
    state.callers.enter(caller, choices, cost, now, size_bytes)
    if own is not None:
        _hand_over(state, requests, caller, own)
    return requests


def _hand_over(
    state: RouterState, requests: list[Request], caller: Caller, own: Callable[[list[Request]], None]
) -> None:
    """Tells the sink which requests are its own; gives the charge back if it does not take them."""
    try:
        own(requests)
    except BaseException:
        for request in requests:
            state.callers.leave(caller, request.cost_tokens, 0)
        raise


def _choice_bytes(message: GenerateRequest, choice: int, choices: int) -> bytes:
    """With n > 1 every choice is a request with n = 1, seeded as vLLM seeds its own children: seed + choice."""
    if choices > 1:
        message.sampling.n = 1
        if choice and message.sampling.HasField("seed"):
            message.sampling.seed += 1
    return message.SerializeToString()


def cancel(state: RouterState, request: Request, now: float) -> None:
    """The client wants no more. Its Finish says CANCELLED; the worker is told."""
    if request.state is RequestState.FINISHED:
        return
    pool = request.pool
    try:
        end(state, request, tokens_pb2.Finish(reason=CANCELLED), now)
    except Exception as error:  # the session has others to serve
        fail(state, request, "end", error, now)
    place_waiting(state, pool, now)
