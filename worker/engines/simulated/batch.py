"""The simulated engine's batch: who runs, and which tokens come next. Pure: no clock, no event loop.

Each token is a hash of every token before it (prompt included), as a greedy model's is a function of them. So a
request that goes on elsewhere from prompt + tokens so far continues with exactly the tokens of an undisturbed run.
All rows advance in a few numpy operations. Called by simulated_engine once a step.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megatoken.tokens.frames import U32, Column
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.config import SimulatedConfig
from megatoken.worker.engines.engine import Ended, EngineRequest, EngineStep, Prefilled

Words = npt.NDArray[np.uint64]

FOLD: Final = np.uint64(0x9E3779B97F4A7C15)  # odd, so that folding a token in loses nothing modulo 2**64
CHOICE_STRIDE: Final = 0xD1B54A32D192ED03
FIRST_TOKEN: Final = 3  # below it stand the special tokens of most vocabularies
LONGEST_LOGPROBS: Final = 20


def scramble(state: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): well-mixed bits of each state."""
    mixed = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def fold_prompt(prompt: Column, salt: int) -> int:
    """The state after `prompt`: the polynomial of its tokens at FOLD, as folding them in one by one gives."""
    powers = np.full(len(prompt), FOLD, np.uint64)
    powers[0] = 1
    powers = np.multiply.accumulate(powers)
    start = int(scramble(np.array([salt], np.uint64))[0])  # 0 for 0; else far from any token
    total = int(np.sum((prompt.astype(np.uint64) + np.uint64(1)) * powers[::-1], dtype=np.uint64))
    return (total + start * pow(int(FOLD), len(prompt), 2**64)) % 2**64


@dataclass(slots=True)
class WaitingRequest:
    """One choice of a request that is not in the batch yet."""

    slot: int
    choice: int
    request: EngineRequest


class SimulatedBatch:
    """Rows 0..running-1 of the arrays are the batch; `waiting` is the queue before it, by priority and arrival."""

    def __init__(self, config: SimulatedConfig, vocab_size: int) -> None:
        self._config = config
        self._span = np.uint64(vocab_size - FIRST_TOKEN)
        rows = config.max_running
        self._slot = np.zeros(rows, np.int64)
        self._state = np.zeros(rows, np.uint64)
        self._made = np.zeros(rows, np.int64)
        self._limit = np.zeros(rows, np.int64)
        self._eos_from = np.zeros(rows, np.int64)  # tokens made before end-of-sequence may come
        self._length = np.zeros(rows, np.int64)  # prompt + made: what the row holds in the KV cache
        self.running = 0
        self._stops: dict[int, frozenset[int]] = {}
        self._logprobs: dict[int, int] = {}
        self._queue: list[tuple[int, int, int]] = []
        self._waiting: dict[int, WaitingRequest] = {}
        self._arrivals = 0
        self._fresh: list[Prefilled] = []

    @property
    def waiting(self) -> int:
        """Choices that wait for a place."""
        return len(self._waiting)

    @property
    def joined(self) -> list[int]:
        """Slots that joined for the next step."""
        return [fresh.slot for fresh in self._fresh]

    @property
    def kv_usage(self) -> float:
        """The share of the KV cache that rows hold."""
        held = int(self._length[: self.running].sum())
        return min(1.0, held / self._config.kv_cache_tokens)

    def add(self, request: EngineRequest) -> None:
        """Queues every choice of a request."""
        for choice, slot in enumerate(request.slots):
            self._waiting[slot] = WaitingRequest(slot, choice, request)
            self._arrivals += 1
            heapq.heappush(self._queue, (request.priority, self._arrivals, slot))

    def remove(self, slots: Sequence[int]) -> None:
        """Forgets these slots, wherever they are."""
        for slot in slots:
            self._waiting.pop(slot, None)  # its queue entry is skipped when it comes up
        self._keep(~np.isin(self._slot[: self.running], slots))

    def admit(self, now_s: float | None = None) -> int:
        """Moves waiting requests into the batch while places, KV cache and the prefill chunk last.

        Returns how many prompt tokens this step prefills. `now_s` is told on as when they joined the batch.
        """
        prefill = 0
        held = int(self._length[: self.running].sum())
        while self._queue and self.running < self._config.max_running:
            entry = self._waiting.get(self._queue[0][2])
            if entry is None:
                heapq.heappop(self._queue)
                continue
            size = len(entry.request.prompt)
            crowded = prefill + size > self._config.prefill_chunk_tokens or held + size > self._config.kv_cache_tokens
            if crowded and self.running:
                break
            heapq.heappop(self._queue)
            del self._waiting[entry.slot]
            self._place(entry, now_s)
            prefill += size
            held += size
        return prefill

    def _place(self, entry: WaitingRequest, now_s: float | None) -> None:
        row, request, sampling = self.running, entry.request, entry.request.sampling
        self.running += 1
        salt = self._config.seed
        if sampling.temperature > 0 or not sampling.HasField("temperature"):
            salt += sampling.seed + entry.choice * CHOICE_STRIDE
        self._slot[row] = entry.slot
        self._state[row] = fold_prompt(request.prompt, salt % 2**64)
        self._made[row] = 0
        self._limit[row] = request.max_tokens
        self._eos_from[row] = request.max_tokens if sampling.ignore_eos else sampling.min_tokens
        self._length[row] = len(request.prompt)
        if sampling.stop_token_ids:
            self._stops[entry.slot] = frozenset(sampling.stop_token_ids)
        if sampling.HasField("logprobs"):
            self._logprobs[entry.slot] = min(max(sampling.logprobs, 0), LONGEST_LOGPROBS)
        self._fresh.append(Prefilled(entry.slot, len(request.prompt), 0, now_s))

    def step(self) -> EngineStep:
        """One token for every row; rows that end leave the batch."""
        rows = slice(0, self.running)
        slot, state = self._slot[rows].copy(), self._state[rows]
        mixed = scramble(state)
        token = mixed % self._span + np.uint64(FIRST_TOKEN)
        over = self._made[rows] + 1 >= self._limit[rows]
        stopped = np.zeros(self.running, bool)
        if self._config.eos_every:
            stopped = (mixed >> np.uint64(40)) % np.uint64(self._config.eos_every) == 0
            stopped &= self._made[rows] >= self._eos_from[rows]
            token[stopped] = self._config.eos_token_id
        self._state[rows] = state * FOLD + token + np.uint64(1)
        self._made[rows] += 1
        self._length[rows] += 1
        ended = self._ends(slot, token, stopped, over)
        made = EngineStep(
            slot=slot.astype(U32),
            token=token.astype(U32),
            prefilled=self._fresh,
            ended=ended,
            details=self._details(slot, token) if self._logprobs else (),
        )
        self._fresh = []
        if ended:
            self._keep(~np.isin(slot, [end.slot for end in ended]))
        return made

    def _ends(self, slot: Any, token: Words, stopped: Any, over: Any) -> list[Ended]:
        ended: dict[int, Ended] = {}
        if self._stops:
            for row, (own, value) in enumerate(zip(slot.tolist(), token.tolist(), strict=True)):
                if value in self._stops.get(own, ()) and not stopped[row]:
                    ended[own] = Ended(own, pb.FINISH_REASON_STOP, stop_token=value)
        for own in slot[stopped].tolist():
            ended[own] = Ended(own, pb.FINISH_REASON_STOP)
        for own in slot[over].tolist():
            ended.setdefault(own, Ended(own, pb.FINISH_REASON_LENGTH))
        return list(ended.values())

    def _details(self, slot: Any, token: Words) -> list[tuple[int, pb.Detail]]:
        details = []
        for own, value in zip(slot.tolist(), token.tolist(), strict=True):
            wanted = self._logprobs.get(own)
            if wanted is None:
                continue
            width = wanted + 1
            others = [value, *((value + rank) % int(self._span) + FIRST_TOKEN for rank in range(wanted))]
            logprobs = pb.Logprobs(width=width, token=others, logprob=[-0.25 - rank for rank in range(width)], rank=[1])
            details.append((own, pb.Detail(logprobs=logprobs)))
        return details

    def _keep(self, keep: npt.NDArray[np.bool_]) -> None:
        left = int(keep.sum())
        if left == self.running:
            return
        for own in self._slot[: self.running][~keep].tolist():
            self._stops.pop(own, None)
            self._logprobs.pop(own, None)
        for values in (self._slot, self._state, self._made, self._limit, self._eos_from, self._length):
            values[:left] = values[: self.running][keep]
        self.running = left
        self._fresh = [fresh for fresh in self._fresh if fresh.slot in self._slot[:left]]
