"""A request is over: settles what it was charged, writes the ledger, tells the client. Exactly once per request."""

from __future__ import annotations

from megatoken.errors import DrainingError, MegatokenError, OverloadError, status_number
from megatoken.router.core.accounts import uncharge
from megatoken.router.core.held import flush_held
from megatoken.router.core.lifecycle import RequestEvent, RequestState
from megatoken.router.core.request import Request
from megatoken.router.core.state import RouterState
from megatoken.v1 import tokens_pb2

STOP = tokens_pb2.FINISH_REASON_STOP
LENGTH = tokens_pb2.FINISH_REASON_LENGTH
CANCELLED = tokens_pb2.FINISH_REASON_CANCELLED
ERROR = tokens_pb2.FINISH_REASON_ERROR


def error_finish(stream: int, error: BaseException) -> tokens_pb2.Finish:
    """The Finish of a request that ends with an error."""
    message = str(error) if isinstance(error, MegatokenError) else f"internal error ({type(error).__name__})"
    draining = isinstance(error, DrainingError)
    code = status_number(error)
    finish = tokens_pb2.Finish(stream=stream, reason=ERROR, code=code, message=message, draining=draining)
    if isinstance(error, OverloadError):
        finish.retry_after_ms = max(1, round(error.retry_after_s * 1000))
    return finish


def generated_by(state: RouterState, request: Request) -> int:
    """Tokens that the client has had or that wait for it."""
    if request.slot < 0:
        return len(request.carried) // 4
    return max(int(state.slots.generated[request.slot]), len(request.replayed) // 4)


def end(state: RouterState, request: Request, finish: tokens_pb2.Finish, now: float) -> None:
    """Finishes a request in whatever state it is. `finish` has what is particular; the rest is filled in here.

    A slot that the worker still knows becomes an orphan if the request's own state is RUNNING; the caller who got the
    worker's Finish frees it before (request.slot = -1 after keeping the count in finish.generated_tokens).
    """
    if request.state is RequestState.QUEUED or request.state is RequestState.RESUMING:
        request.pool.queue.remove(request)
    if request.delivery:
        try:
            flush_held(state, request)
        except Exception as error:  # it ends all the same
            state.faults.caught("delivery", error)
    if request.slot >= 0:
        finish.generated_tokens = generated_by(state, request)
        replica = uncharge(state, request, now)
        if replica is not None and replica.link is not None:
            replica.link.send_cancel(request.slot)
        state.pages.free(request.slot)
        state.slots.orphan(request.slot, now)
        request.slot = -1
    elif request.carried:
        finish.generated_tokens = len(request.carried) // 4
    settle(state, request, finish, now)


def fail(state: RouterState, request: Request, where: str, error: Exception, now: float) -> None:
    """A fault of ours while something was done for this request: it is counted, and the request ends with INTERNAL."""
    state.faults.caught(where, error)
    if request.state is not RequestState.FINISHED:
        try:
            end(state, request, error_finish(0, error), now)
        except Exception as again:
            state.faults.caught("end", again)


def settle(state: RouterState, request: Request, finish: tokens_pb2.Finish, now: float) -> None:
    """The last step of every way to end: state, ledger, latency, and the client's Finish.

    Whatever goes wrong with an account or with who listens, the client gets its Finish.
    """
    request.move(RequestEvent.ENDED)
    state.live -= 1
    if request.delivery:
        state.held -= 1
    finish.stream = request.stream
    if not finish.prompt_tokens or request.base_tokens:
        finish.prompt_tokens = request.prompt_tokens
    finish.resumes = request.resumes
    if request.resumes and request.resume_note:
        finish.resume_note = request.resume_note
    # Lets go of the request's bytes at once, whoever still has the object.
    state.live_bytes -= len(request.raw)
    request.raw = request.carried = request.replayed = b""
    request.held_details.clear()
    for account in (_leave_caller, _forget, _settle_accounts):
        try:
            account(state, request, finish, now)
        except Exception as error:
            state.faults.caught("accounts", error)
    encoded = finish.SerializeToString()
    for _ in range(2):  # a sink that raised took nothing; a client that hears of no end would wait for ever
        try:
            request.sink.push_finish(request, encoded)
            break
        except Exception as error:
            state.faults.caught("delivery", error)
    for told in state.on_finished:
        try:
            told(request, finish, now)
        except Exception as error:
            state.faults.caught("request log", error)


def _leave_caller(state: RouterState, request: Request, finish: tokens_pb2.Finish, _now: float) -> None:
    """Gives its key back the request's place, and what it was charged too much."""
    state.callers.leave(request.caller, request.cost_tokens, request.prompt_tokens + finish.generated_tokens)


def _forget(state: RouterState, request: Request, _finish: tokens_pb2.Finish, _now: float) -> None:
    """Lets go of its entries in the heaps."""
    if request.deadline_s != float("inf"):
        state.deadlines.ended()
    if request.hold_due:
        state.holds.ended()


def _settle_accounts(state: RouterState, request: Request, finish: tokens_pb2.Finish, now: float) -> None:
    failed = finish.reason in (ERROR, CANCELLED)
    state.ledger.add("requests_failed" if failed else "requests_finished")
    if not failed:
        request.pool.saw_output(finish.generated_tokens, request.max_tokens)
    request.pool.measures.ended(finish.reason, now - request.arrived_s)
