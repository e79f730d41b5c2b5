"""One replica as its worker sees it: requests in, engine steps out, and the account of both.

Everything a request can meet is decided here: it is refused (draining, full, wrong), runs, ends, is cancelled, runs
out of time, or loses its engine. Each way ends in exactly one Finish a stream. Knows nothing of gRPC; server.py
calls it, on one loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Final

from megatoken.access.lease import LeaseTerms
from megatoken.errors import (
    DeadlineError,
    DrainingError,
    EngineDeadError,
    MegatokenError,
    OverloadError,
    RequestError,
    UnavailableError,
    status_number,
)
from megatoken.log import log_event
from megatoken.tokens.ranges import MAX_CHOICES
from megatoken.tracing import Attributes, Span, Tracer, finish_reasons
from megatoken.v1 import frame_columns_pb2 as columns
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker import totals
from megatoken.worker.config import WorkerConfig
from megatoken.worker.energy import EnergyMeter
from megatoken.worker.engines.engine import Ended, Engine, EngineFacts, EngineStep
from megatoken.worker.engines.requests import check_request
from megatoken.worker.measures import WorkerMeasures
from megatoken.worker.streams.finish import end_of, refusal
from megatoken.worker.streams.outlet import Outlet
from megatoken.worker.streams.table import Running, StreamTable

LOAD_INTERVAL_S: Final = 0.2  # how often a changed load goes out at most
RETRY_AFTER_S: Final = 1.0  # told to a caller when this worker is full

_log = logging.getLogger(__name__)


class StreamInUseError(RequestError):
    """A session used a stream number twice at a time."""


class RunningReplica:
    """The `StepSink` of the engine, and the one door to it."""

    def __init__(
        self,
        config: WorkerConfig,
        engine: Engine,
        counters: memoryview,
        measures: WorkerMeasures,
        on_dead: Callable[[str], None],
    ) -> None:
        self.config = config
        self.engine = engine
        self.counters = counters
        self.measures = measures
        self.draining = False
        self.fenced = ""  # why it may not serve now; empty: it may
        self.dead: str | None = None  # why the engine is gone
        self.drained = asyncio.Event()
        self.tracer: Tracer | None = None
        self.energy: EnergyMeter | None = None  # of its devices, where they can be read
        self._on_dead = on_dead
        self._streams = StreamTable()
        self._sessions: set[Outlet] = set()
        self._busy = totals.BusyClock()
        self._dropped_tokens = 0  # they waited for a caller that went away
        self.probe_tokens = 0  # made for the control plane's own requests
        self._last_load = b""
        self._threads = config.threads(len(os.sched_getaffinity(0)))  # of a rank on CPU
        self._ticker: asyncio.TimerHandle | None = None

    async def start(self) -> EngineFacts:
        """Starts the engine. Raises EngineDeadError when it does not come up in time."""
        try:
            async with asyncio.timeout(self.config.start_timeout_s):  # wait_for may lose a cancel
                self.facts = await self.engine.start(self)
        except TimeoutError:
            raise EngineDeadError(f"the engine did not start within {self.config.start_timeout_s:g} s") from None
        self._loop = asyncio.get_running_loop()
        return self.facts

    @property
    def running(self) -> int:
        """Streams that have not ended."""
        return self._streams.live

    @property
    def sessions(self) -> int:
        """Open Session calls."""
        return len(self._sessions)

    def open(self, outlet: Outlet, wants_load: bool) -> None:
        """A caller appears; sessions are told the load."""
        self._streams.open(outlet)
        if wants_load:
            self._sessions.add(outlet)
            outlet.state_load(self.load())

    def close(self, outlet: Outlet) -> None:
        """A caller is gone: aborts what it has running."""
        self._dropped_tokens += outlet.close()
        self._account_tokens()
        self._abort(list(outlet.slots.values()), pb.FINISH_REASON_CANCELLED)
        self._sessions.discard(outlet)
        self._streams.close(outlet)

    def submit(self, outlet: Outlet, number: int, request: columns.GenerateRequest) -> None:
        """Starts a request; whatever is wrong with it comes back as its Finish.

        Raises StreamInUseError for a number that is taken: a Finish for it would end the request that has it.
        """
        # First of all, since the refusal of anything else is a Finish for these numbers.
        if any(taken in outlet.slots for taken in _numbers(number, request)):
            raise StreamInUseError("stream", number, "a number that none of the session's running requests uses")
        try:
            self._submit(outlet, number, request)
        except MegatokenError as error:
            self.measures.refused(error)
            self._refuse(outlet, number, request, error)
        except Exception as error:  # a defect met by one request must not end the others of its session
            _log.exception("a request failed before it ran")
            self.measures.refused(error)
            self._refuse(outlet, number, request, error)

    def _refuse(self, outlet: Outlet, number: int, request: columns.GenerateRequest, error: Exception) -> None:
        for refused in _numbers(number, request):
            outlet.finish(refusal(refused, error, self.config.replica))

    def submit_probe(self, outlet: Outlet, message: columns.GenerateRequest) -> None:
        """Starts a request of the control plane's own: it runs while draining, and counts in no total."""
        try:
            if self.dead is not None:
                raise EngineDeadError(f"replica {self.config.replica}: {self.dead}")
            request = check_request(message, self.config.model, self.facts)
            self.engine.check(request)
            running = Running(request, outlet, time.monotonic(), request.choices, probe=True)
            self._streams.allot(running, 0)
            self.engine.submit(request)
        except MegatokenError as error:
            outlet.finish(refusal(0, error, self.config.replica))

    def _submit(self, outlet: Outlet, number: int, message: columns.GenerateRequest) -> None:
        self._check_open()
        lease = None
        if outlet.leases is not None:
            prompt_tokens = len(message.prompt) // 4
            lease = outlet.leases.check(message, prompt_tokens, self.facts.max_model_len - prompt_tokens)
        request = check_request(message, self.config.model, self.facts)
        now_s = time.monotonic()
        if self._streams.live + request.choices > self.config.max_requests:
            raise OverloadError(
                f"{self._streams.live} streams run here and {self.config.max_requests} is the limit", RETRY_AFTER_S
            )
        self.engine.check(request)
        running = Running(request, outlet, now_s, request.choices, lease=lease)
        if self.tracer is not None:
            attributes = {"megatoken.request_id": request.request_id, "megatoken.replica": self.config.replica}
            request.traceparent, running.span = self.tracer.begin(
                "worker request", request.traceparent, now_s, attributes
            )
        self._streams.allot(running, number)
        if lease is not None and outlet.leases is not None:
            outlet.leases.take(lease)
            left_s = outlet.leases.left_s(lease)
            if left_s is not None:
                running.lease_end = self._loop.call_later(left_s, self._end_lease, running)
        if message.timeout_ms:
            running.deadline = self._loop.call_later(message.timeout_ms / 1000, self._expire, running)
        self.counters[totals.REQUESTS_STARTED] += 1
        self._account_time()
        self.engine.submit(request)
        self._start_ticker()

    def _check_open(self) -> None:
        if self.dead is not None:
            raise EngineDeadError(f"replica {self.config.replica}: {self.dead}")
        if self.draining:
            raise DrainingError(f"replica {self.config.replica} is draining and takes no new requests")
        if self.fenced:
            raise UnavailableError(f"replica {self.config.replica} is fenced: {self.fenced}")

    def cancel(self, outlet: Outlet, numbers: Sequence[int]) -> None:
        """Aborts these streams of a caller; numbers that do not run (any more) are passed over."""
        slots = [outlet.slots[number] for number in dict.fromkeys(numbers) if number in outlet.slots]
        self._abort(slots, pb.FINISH_REASON_CANCELLED)

    def on_step(self, step: EngineStep) -> None:
        """Takes one engine step: counts, ends what ended, and passes the columns on."""
        now_s = time.monotonic()
        if len(step.slot):
            gaps, first = self._streams.advance(step, now_s)
            self.measures.step(gaps, first, step.count)
        for prefilled in step.prefilled:
            running = self._streams[prefilled.slot]
            running.cached_tokens = max(running.cached_tokens, prefilled.cached_tokens)
            if running.request.tell_cached and prefilled.cached_tokens:
                told = pb.Detail(cached_tokens=prefilled.cached_tokens)
                step.details = [*step.details, (prefilled.slot, told)]
            if prefilled.slot == running.request.slots[0] and running.span is not None:
                running.span.event("scheduled", prefilled.scheduled_s or running.arrived_s)
                running.span.event("first token", now_s)
            if prefilled.slot == running.request.slots[0] and not running.probe:
                self.counters[totals.PROMPT_TOKENS] += prefilled.prompt_tokens
                self.counters[totals.CACHED_TOKENS] += prefilled.cached_tokens
                self.measures.scheduled(running.arrived_s, prefilled.scheduled_s, now_s)
        finishes: dict[Outlet, list[bytes]] = {}
        for ended in step.ended:
            finish = self._finish(ended).SerializeToString()
            finishes.setdefault(self._streams[ended.slot].outlet, []).append(finish)
        self._streams.split(step, finishes)
        for ended in step.ended:
            self._release(ended.slot, ended.reason, now_s)
        self._account_tokens()

    def on_engine_dead(self, reason: str) -> None:
        """Ends every stream with UNAVAILABLE, then tells the process, which exits."""
        if self.dead is not None:
            return
        self.dead = reason
        error = EngineDeadError(f"replica {self.config.replica} lost its engine: {reason}")
        self._end_all(error, notify_engine=False)
        self._on_dead(reason)

    def written(self, tokens: int) -> None:
        """A frame with this many tokens is handed to its caller's connection.

        Counted here and not when the engine made them: so the total is what a router can have received, and tokens of
        a stream that was cancelled meanwhile are in neither's account.
        """
        self.counters[totals.GENERATED_TOKENS] += tokens
        self.measures.frame(tokens)

    def drain(self) -> int:
        """Refuses new requests from now on; returns how many still run."""
        if not self.draining:
            self.draining = True
            log_event(_log, "replica.draining", replica=self.config.replica, running=self.running)
        self._note_drained()
        return self.running

    def share_cores(self, ranks: int) -> None:
        """So many ranks share its busiest node's cores from now on."""
        threads = self.config.threads(len(os.sched_getaffinity(0)), ranks)
        if threads != self._threads and self.dead is None:
            log_event(_log, "replica.threads", replica=self.config.replica, threads=threads, ranks=ranks)
            self._threads = threads
            self.engine.set_threads(threads)

    def fence(self, reason: str) -> None:
        """Serves nobody from now on; see fence.py, which calls it."""
        self.fenced = reason
        self._end_all(UnavailableError(f"replica {self.config.replica} is fenced: {reason}"), notify_engine=True)

    def unfence(self) -> None:
        """Serves again."""
        self.fenced = ""

    def end_running(self) -> None:
        """Ends what still runs with UNAVAILABLE, so that a router resumes it elsewhere."""
        self._end_all(UnavailableError(f"replica {self.config.replica} stopped"), notify_engine=True)

    def load(self) -> pb.Load:
        """The load as of now."""
        self._account_time()
        if self.energy is not None:
            self.counters[totals.ENERGY_MJ] = self.energy.used_mj()
        engine = self.engine.load
        return pb.Load(
            running=engine.running,
            waiting=engine.waiting,
            kv_usage=engine.kv_usage,
            prompt_tokens=self.counters[totals.PROMPT_TOKENS],
            generated_tokens=self.counters[totals.GENERATED_TOKENS],
            cached_tokens=self.counters[totals.CACHED_TOKENS],
            busy_us=self.counters[totals.BUSY_US],
            steps=engine.steps,
        )

    def _finish(self, ended: Ended) -> pb.Finish:
        streams = self._streams
        return end_of(
            ended,
            streams[ended.slot],
            stream=int(streams.number[ended.slot]),
            generated=int(streams.generated[ended.slot]),
            replica=self.config.replica,
        )

    def _release(self, slot: int, reason: int, now_s: float) -> None:
        running = self._streams[slot]
        running.generated += int(self._streams.generated[slot])
        self._streams.free(slot)
        running.failed |= reason in (pb.FINISH_REASON_CANCELLED, pb.FINISH_REASON_ERROR)
        running.choices_left -= 1
        if running.choices_left:
            return
        if running.probe:
            self.probe_tokens += running.generated
            self._note_drained()
            return
        if running.deadline is not None:
            running.deadline.cancel()
        if running.lease is not None:
            self._settle_lease(running, running.lease)
        which = totals.REQUESTS_FAILED if running.failed else totals.REQUESTS_FINISHED
        self.counters[which] += 1
        self.measures.ended(reason, now_s - running.arrived_s)
        if running.span is not None:
            self._end_span(running, running.span, reason, now_s)
        self._account_time()
        self._note_drained()

    @staticmethod
    def _end_span(running: Running, span: Span, reason: int, now_s: float) -> None:
        attributes: Attributes = {
            "gen_ai.usage.input_tokens": len(running.request.prompt),
            "gen_ai.usage.output_tokens": running.generated,
            "megatoken.cached_tokens": running.cached_tokens,
            "gen_ai.response.finish_reasons": finish_reasons(reason),
        }
        span.end(now_s, attributes, "it ended with an error" if reason == pb.FINISH_REASON_ERROR else None)

    def _abort(self, slots: list[int], reason: int, error: MegatokenError | None = None, notify: bool = True) -> None:
        if not slots:
            return
        if notify:
            self.engine.abort(slots)
        now_s = time.monotonic()
        code, message = (0, "") if error is None else (status_number(error), str(error))
        for slot in slots:
            finish = self._finish(Ended(slot, reason, code=code, message=message))
            finish.engine_dead = isinstance(error, EngineDeadError)
            self._streams[slot].outlet.finish(finish)
            self._release(slot, reason, now_s)

    def _expire(self, running: Running) -> None:
        slots = [slot for slot in running.request.slots if self._streams.holds(slot, running)]
        waited_s = time.monotonic() - running.arrived_s
        error = DeadlineError(f"timeout_ms passed after {waited_s:.3f} s")
        self._abort(slots, pb.FINISH_REASON_ERROR, error)

    def _end_lease(self, running: Running) -> None:
        slots = [slot for slot in running.request.slots if self._streams.holds(slot, running)]
        self._abort(slots, pb.FINISH_REASON_ERROR, DeadlineError("lease: it ended while its request ran"))

    def _settle_lease(self, running: Running, lease: LeaseTerms) -> None:
        """Tells the routers what a leased request really used: the one that signed it settles by that."""
        if running.lease_end is not None:
            running.lease_end.cancel()
        usage = pb.LeaseUsage(
            lease_id=lease.lease_id,
            prompt_tokens=len(running.request.prompt),
            generated_tokens=running.generated,
        )
        for outlet in self._sessions:
            outlet.state_usage(usage)

    def _end_all(self, error: MegatokenError, notify_engine: bool) -> None:
        for running in list(self._streams.all()):
            slots = [slot for slot in running.request.slots if self._streams.holds(slot, running)]
            self._abort(slots, pb.FINISH_REASON_ERROR, error, notify_engine)

    def _note_drained(self) -> None:
        if self.draining and not self._streams.live:
            self.drained.set()

    def _account_tokens(self) -> None:
        """What `generated_tokens` lacks of the engine's: dropped ones, and those that wait to be written."""
        load = self.engine.load
        self.counters[totals.MADE_TOKENS] = load.made_tokens - self.probe_tokens
        self.counters[totals.DROPPED_TOKENS] = load.unwanted_tokens + self._dropped_tokens

    def _account_time(self) -> None:
        self.counters[totals.BUSY_US] += self._busy.update(self._streams.live > 0, time.monotonic())

    def _start_ticker(self) -> None:
        if self._ticker is None:
            self._ticker = self._loop.call_later(LOAD_INTERVAL_S, self._tick)

    def _tick(self) -> None:
        """Tells sessions a changed load; runs on until the load rests."""
        self._ticker = None
        load = self.load()
        encoded = load.SerializeToString(deterministic=True)
        if encoded == self._last_load and not self._streams.live:
            return
        self._last_load = encoded
        for outlet in self._sessions:
            outlet.state_load(load)
        self._start_ticker()


def _numbers(first: int, request: columns.GenerateRequest) -> list[int]:
    """The stream numbers of a request's choices, wrong requests included."""
    choices = request.sampling.n if 1 < request.sampling.n <= MAX_CHOICES else 1
    return [(first + choice) % 2**32 for choice in range(choices)]
