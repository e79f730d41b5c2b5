"""What a worker asks of an engine, whichever it is.

The worker gives every request a slot (a small number, reused after its end) and the engine speaks of requests by
slot only. An engine reports each step as one `EngineStep` of columns, so that what follows costs per step and not per
token. It calls its sink on the event loop that started it. Two kinds of failure are kept apart: a request's own (an
`Ended` with ERROR) and the engine's (`on_engine_dead`, once, after which nothing else comes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatoken.tokens.frames import Column
from megatoken.v1 import tokens_pb2 as pb


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What is fixed once an engine has started."""

    engine: str  # "vllm" or "simulated"
    version: str
    max_model_len: int  # tokens of prompt and answer
    vocab_size: int
    max_running: int
    block_size: int
    kv_cache_tokens: int
    weights: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of its source's files; empty: no directory
    loras: tuple[str, ...] = ()
    transfers: tuple[str, ...] = ()  # parameters in extra_args that its connectors take: "kv_transfer_params"


@dataclass(slots=True)
class EngineRequest:
    """One checked request. `slots` has one entry a choice."""

    request_id: str
    prompt: Column
    sampling: pb.SamplingParams
    max_tokens: int  # what may still be generated, a choice
    choices: int = 1
    lora: str = ""
    priority: int = 0
    cache_salt: str = ""
    resumed_tokens: int = 0  # how many at the end of `prompt` were generated before
    traceparent: str = ""
    resume_note: str = ""  # what of a resumed request may differ from an undisturbed run; set by the engine's check
    tell_cached: bool = False  # with the first token, what came of the prefix cache
    slots: tuple[int, ...] = ()
    prepared: Any = None  # what the engine's check made, for its submit


@dataclass(slots=True)
class Ended:
    """The end of one slot's stream, after its tokens of the same step."""

    slot: int
    reason: int  # pb.FinishReason
    stop_token: int | None = None
    code: int = 0  # with ERROR: a gRPC status number
    message: str = ""


@dataclass(slots=True)
class Prefilled:
    """A slot whose prompt went through the engine in this step."""

    slot: int
    prompt_tokens: int
    cached_tokens: int
    scheduled_s: float | None = None  # monotonic clock, when it joined the batch; None: not told


@dataclass(slots=True)
class EngineStep:
    """What one engine step made. Each slot stands at most once in `slot`."""

    slot: Column
    token: Column
    count: Column | None = None  # tokens of each slot; None: one each
    prefilled: Sequence[Prefilled] = ()
    ended: Sequence[Ended] = ()
    details: Sequence[tuple[int, pb.Detail]] = ()  # by slot; Detail.stream is filled in by the worker


@dataclass(slots=True)
class EngineLoad:
    """An engine's own view of its queue and cache, kept up to date by the engine."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0  # [0, 1]
    prefix_queries: int = 0  # tokens looked up in the prefix cache, in total
    prefix_hits: int = 0
    made_tokens: int = 0  # handed over by the engine, in total
    unwanted_tokens: int = 0  # of them, for requests that nobody waits for any more
    steps: int = 0
    details: dict[str, float] = field(default_factory=dict)


class StepSink(Protocol):
    """Who an engine reports to."""

    def on_step(self, step: EngineStep) -> None:
        """Called after each engine step that made something. Must not block."""

    def on_engine_dead(self, reason: str) -> None:
        """Called once when the engine can serve no more. `reason` is one sentence."""


class Engine(Protocol):
    """One replica's engine. Every method is called on the event loop that `start` ran on."""

    load: EngineLoad

    def boot(self) -> None:
        """Starts the engine's processes, before any event loop or thread of this one; blocks until they serve.

        Raises RequestError for a configuration that cannot work, EngineDeadError when the engine does not come up.
        """

    async def start(self, sink: StepSink) -> EngineFacts:
        """Begins to report to the sink; called once, after `boot`, on the loop that serves."""

    def check(self, request: EngineRequest) -> None:
        """The engine's own validation. Raises RequestError; changes nothing that runs, and may fill the request in."""

    def submit(self, request: EngineRequest) -> None:
        """Hands over a checked request with its slots. Never blocks; its results come to the sink."""

    def abort(self, slots: Sequence[int]) -> None:
        """Forgets these slots: nothing more comes for them, and the engine stops their work within a step."""

    def set_threads(self, threads: int) -> None:
        """Has each rank on CPU compute with so many threads from its next step on."""

    def exposition(self) -> bytes:
        """The engine's own metrics as Prometheus text, labelled with model and replica; empty when it has none.

        Called after `start`, from another thread.
        """

    async def stop(self) -> None:
        """Stops the engine and waits until its processes are gone. Idempotent."""
