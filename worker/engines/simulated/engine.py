"""An engine without a model, for tests and scale work: settable speeds, seeded tokens, faults on demand.

It keeps time on the event loop: a step takes `step_s` and the time its prefills need, and ends on an absolute
schedule, so that a late wake-up does not lower the rate. A prompt longer than `prefill_chunk_tokens` takes a step a
chunk, and makes no token before the last. It names itself "simulated" wherever an engine is named.
Never a default.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from megatoken.errors import RequestError
from megatoken.worker.config import FaultConfig, SimulatedConfig
from megatoken.worker.engines.engine import EngineFacts, EngineLoad, EngineRequest, StepSink
from megatoken.worker.engines.simulated.batch import SimulatedBatch

LATEST_S: Final = 0.5  # how far behind its schedule the engine tries to catch up


class SimulatedEngine:
    """The `Engine` protocol over a SimulatedBatch."""

    def __init__(self, config: SimulatedConfig, max_model_len: int | None, max_running: int | None) -> None:
        if max_running is not None:
            config = config.model_copy(update={"max_running": max_running})
        self.load = EngineLoad()
        self._config = config
        self._max_model_len = max_model_len or config.max_model_len
        self._step_s = config.step_s or config.max_running / config.decode_tokens_per_s
        self._batch = SimulatedBatch(config, config.vocab_size)
        self._faults: list[FaultConfig] = list(config.faults)
        self._slowness = 1.0
        self._timer: asyncio.Handle | None = None
        self._fault_timers: list[asyncio.TimerHandle] = []
        self._schedule_s = 0.0
        self._chunks_left = 0  # steps of a long prefill before the one that makes a token
        self._chunk_s = 0.0
        self._poisoned: dict[int, FaultConfig] = {}  # by slot: what happens once it was in a step
        self._halted = False

    def boot(self) -> None:
        """Needs no process."""

    async def start(self, sink: StepSink) -> EngineFacts:
        """Waits `start_s` and serves."""
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        await asyncio.sleep(self._config.start_s)
        for fault in self._faults:
            if fault.after_s is not None:
                self._fault_timers.append(self._loop.call_later(fault.after_s, self._make_fault, fault))
        return EngineFacts(
            engine="simulated",
            version="simulated-1",
            max_model_len=self._max_model_len,
            vocab_size=self._config.vocab_size,
            max_running=self._config.max_running,
            block_size=self._config.block_size,
            kv_cache_tokens=self._config.kv_cache_tokens,
        )

    def check(self, request: EngineRequest) -> None:
        """Refuses what a simulation has no answer for."""
        if request.sampling.HasField("structured_outputs"):
            raise RequestError("sampling.structured_outputs", "set", "unset: a simulated engine has no grammar")
        if request.sampling.HasField("prompt_logprobs"):
            raise RequestError("sampling.prompt_logprobs", request.sampling.prompt_logprobs, "unset: simulated engine")

    def submit(self, request: EngineRequest) -> None:
        """Queues the request; an idle engine starts a step at once."""
        self._batch.add(request)
        for fault in self._faults:
            if fault.on_token is not None and fault.on_token in request.prompt:
                self._poisoned |= dict.fromkeys(request.slots, fault)
        self._state_load()
        if self._timer is None and not self._halted:
            self._schedule_s = self._loop.time()
            self._timer = self._loop.call_soon(self._begin_step)  # with all that came in the same message

    def abort(self, slots: Sequence[int]) -> None:
        """Forgets these slots."""
        self._batch.remove(slots)
        for slot in slots:
            self._poisoned.pop(slot, None)
        self._state_load()

    def set_threads(self, threads: int) -> None:
        """Computes nothing."""

    def exposition(self) -> bytes:
        """Has no metrics of its own."""
        return b""

    async def stop(self) -> None:
        """Makes no further step."""
        self._halt()

    def _begin_step(self) -> None:
        prefill = self._batch.admit(self._loop.time())
        self._state_load()
        if not self._batch.running:
            self._timer = None
            return
        chunks = max(1, -(-prefill // self._config.prefill_chunk_tokens))
        self._chunks_left = chunks - 1
        self._chunk_s = (self._step_s + prefill / self._config.prefill_tokens_per_s / chunks) * self._slowness
        self._schedule_step()

    def _schedule_step(self) -> None:
        self._schedule_s = max(self._schedule_s, self._loop.time() - LATEST_S) + self._chunk_s
        self._timer = self._loop.call_at(self._schedule_s, self._end_step)

    def _end_step(self) -> None:
        poison = next((self._poisoned[slot] for slot in self._poisoned if slot in self._batch.joined), None)
        if poison is not None:
            self._make_fault(poison)
            if self._halted:
                return
        if self._chunks_left and self._batch.running:
            self._chunks_left -= 1
            self.load.steps += 1
            self._schedule_step()
            return
        if self._batch.running:  # every request may have been aborted meanwhile
            step = self._batch.step()
            self.load.made_tokens += len(step.token)
            self.load.steps += 1
            self._sink.on_step(step)
        for fault in [fault for fault in self._faults if fault.after_tokens is not None]:
            if self.load.made_tokens >= (fault.after_tokens or 0):
                self._make_fault(fault)
        if not self._halted:
            self._begin_step()

    def _state_load(self) -> None:
        self.load.running, self.load.waiting = self._batch.running, self._batch.waiting
        self.load.kv_usage = self._batch.kv_usage

    def _make_fault(self, fault: FaultConfig) -> None:
        if fault in self._faults:
            self._faults.remove(fault)
        if fault.kind == "slow":
            self._slowness = fault.factor
            return
        self._halt()
        if fault.kind == "die":
            self._sink.on_engine_dead("the simulated engine died, as its configuration asked")

    def _halt(self) -> None:
        self._halted = True
        for timer in (self._timer, *self._fault_timers):
            if timer is not None:
                timer.cancel()
