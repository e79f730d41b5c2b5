"""Streams of every kind killed at each of their tokens, and a second time at each token of what followed.

The router's real core against an engine whose tokens and rows of log probabilities follow from all that came before:
a seeded stream from its seed and position too, a structured one from how much was generated under its grammar. What
the client has in the end is what the undisturbed stream gives, token by token and row by row.
"""

from __future__ import annotations

import asyncio
import os
import random
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from megatoken.router.core.request import Request
from megatoken.router.fleet.fleet import Endpoint
from megatoken.v1 import tokens_pb2
from tests.chaos.outcome import Outcome
from tests.support.router_core import CoreFleet

NAME = "replay"
ABOUT = "seeded, scored, parallel, held and structured streams killed at every token, and twice"

LENGTH: Final = tokens_pb2.FINISH_REASON_LENGTH
PROMPT: Final = (5, 6, 7)
FULL_TOKENS, SHORT_TOKENS = 16, 8
WIDTH: Final = 2  # alternatives of a row
LAST_TURN: Final = 200
Row = tuple[int, ...]

_SEEDED: Final[dict[str, Any]] = {"seed": 7, "temperature": 1.0}
_SCORED: Final[dict[str, Any]] = {"logprobs": WIDTH - 1}
_SCHEMA: Final = tokens_pb2.StructuredOutputs(json_object=True)
KINDS: Final[dict[str, dict[str, Any]]] = {
    "greedy": {},
    "seeded": _SEEDED,
    "scored": _SCORED,
    "seeded and scored": _SEEDED | _SCORED,
    "scored prompt": _SCORED | {"prompt_logprobs": WIDTH - 1},
    "seeded, scored prompt": _SEEDED | _SCORED | {"prompt_logprobs": WIDTH - 1},
    "two choices": {"n": 2},
    "two seeded and scored choices": _SEEDED | _SCORED | {"n": 2},
    "coalesced": _SCORED | {"delivery": 1, "max_delay_ms": 50},
    "coalesced and seeded": _SEEDED | _SCORED | {"delivery": 1, "max_delay_ms": 50},
    "whole": _SCORED | {"delivery": 2},
    "whole and seeded": _SEEDED | _SCORED | {"delivery": 2},
    "structured": _SCORED | {"structured_outputs": _SCHEMA},
    "structured and seeded": _SEEDED | {"structured_outputs": _SCHEMA},
}


def _hash(*what: object) -> int:
    return zlib.crc32(repr(what).encode())


def next_token(context: Sequence[int], seed: int, position: int, generated: int | None) -> int:
    """`position`: of a seeded stream's random numbers. `generated`: what its grammar was advanced by, if it has one."""
    return _hash(list(context), seed, position if seed else 0, generated) % 50_000


def row_of(context: Sequence[int]) -> Row:
    """Width alternatives, their log probabilities (quarters, exact as floats), and the rank of the last token."""
    value = _hash("row", list(context))
    alternatives = [(value + i) % 50_000 for i in range(WIDTH)]
    return (*alternatives, *(-((value >> i) % 64) for i in range(WIDTH)), value % 100 + 1)


@dataclass(slots=True)
class Stream:
    """What an engine makes of one request."""

    tokens: list[int]
    left: int
    seed: int
    resumed: int
    structured: bool
    scored: bool
    scored_prompt: bool
    made: int = 0

    def make(self) -> Row:
        generated = self.resumed + self.made if self.structured else None
        self.tokens.append(next_token(self.tokens, self.seed, self.made, generated))
        self.made, self.left = self.made + 1, self.left - 1
        return row_of(self.tokens)


def stream_of(request: tokens_pb2.GenerateRequest) -> Stream:
    sampling = request.sampling
    return Stream(
        list(request.prompt), sampling.max_tokens, sampling.seed if sampling.temperature else 0, request.resumed_tokens,
        sampling.HasField("structured_outputs"), sampling.HasField("logprobs"), sampling.HasField("prompt_logprobs"),
    )  # fmt: skip


def logprobs_of(rows: list[Row]) -> tokens_pb2.Logprobs:
    return tokens_pb2.Logprobs(
        width=WIDTH,
        token=[token for row in rows for token in row[:WIDTH]],
        logprob=[value / 4 for row in rows for value in row[WIDTH : 2 * WIDTH]],
        rank=[row[-1] for row in rows],
    )


def rows_of(values: tokens_pb2.Logprobs) -> list[Row]:
    width = values.width
    return [
        (
            *values.token[i * width : (i + 1) * width],
            *(round(4 * value) for value in values.logprob[i * width : (i + 1) * width]),
            values.rank[i],
        )
        for i in range(len(values.rank))
    ]


@dataclass(slots=True)
class Got:
    """Of one choice, as its client put it together."""

    tokens: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    prompt_rows: list[Row] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


class Trial:
    """One request on a fleet of three."""

    def __init__(self, kind: str, tokens: int, longest: int, rng: random.Random) -> None:
        self.rng, self.longest = rng, longest
        self.fleet = CoreFleet(replicas=3, max_running=8, resume={"max_resumes": 9})
        self.engines: dict[Endpoint, dict[int, Stream]] = {replica: {} for replica in self.fleet.replicas}
        fields = KINDS[kind]
        self.choices = int(fields.get("n", 1))
        self.fleet.submit(PROMPT, max_tokens=tokens, **fields)
        self.requests: list[Request] = list(self.fleet.sink.requests.values())

    def until_made(self, tokens: int) -> bool:
        """Goes on until this attempt of the first choice made so many; whether it still runs then."""
        request = self.requests[0]
        for _ in range(LAST_TURN):
            if request.replica is None:
                return False
            stream = self._taken(request.replica).get(request.slot)
            made = stream.made if stream is not None else 0
            if made >= tokens:
                return True
            self.turn(request, tokens - made)
        return False

    def kill(self) -> None:
        replica = self.fleet.replica_of(self.requests[0])
        self.engines[replica] = {}
        self.fleet.lose(replica)
        self.fleet.connect(replica)

    def finish(self) -> None:
        for _ in range(LAST_TURN):
            if not self.fleet.state.live:
                return
            self.turn()

    def turn(self, watched: Request | None = None, most: int = 1 << 30) -> None:
        """A step of every engine; the watched request gets at most so many tokens in it, and no end."""
        for replica in self.fleet.replicas:
            for slot in list(self._taken(replica)):
                own = watched is not None and watched.replica is replica and watched.slot == slot
                self._step(replica, slot, min(most, self.longest) if own else self.longest, ends=not own)
        self.fleet.tick(0.02)

    def _taken(self, replica: Endpoint) -> dict[int, Stream]:
        """The engine's streams, once it has read what the router sent."""
        link, streams = self.fleet.link(replica), self.engines[replica]
        for slot, request in link.started.items():
            streams[slot] = stream_of(request)
            if streams[slot].scored_prompt:  # sent ahead, as a long one's are
                rows = [row_of(request.prompt[: i + 1]) for i in range(len(request.prompt))]
                ahead = tokens_pb2.Detail(stream=slot, prompt_logprobs=logprobs_of(rows))
                self.fleet.frame(replica, detail=[ahead])
        link.started.clear()
        for slot in link.cancelled:
            if streams.pop(slot, None) is not None:
                self.fleet.frame(replica, finish=[tokens_pb2.Finish(stream=slot, reason=3)])
        link.cancelled.clear()
        return streams

    def _step(self, replica: Endpoint, slot: int, most: int, *, ends: bool) -> None:
        stream = self.engines[replica][slot]
        rows = [stream.make() for _ in range(min(stream.left, self.rng.randint(1, most)))]
        details = []
        cuts = sorted(self.rng.sample(range(1, len(rows)), self.rng.randrange(len(rows)))) if len(rows) > 1 else []
        for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True):
            if stream.scored and stop > start:
                details.append(tokens_pb2.Detail(stream=slot, logprobs=logprobs_of(rows[start:stop])))
        finish = []
        if ends and not stream.left:
            finish = [tokens_pb2.Finish(stream=slot, reason=LENGTH)]
            del self.engines[replica][slot]
        tokens = stream.tokens[len(stream.tokens) - len(rows) :]
        columns = {"stream": [slot], "count": [len(tokens)], "token": tokens} if tokens else {}
        self.fleet.frame(replica, detail=details, finish=finish, **columns)

    def got(self) -> list[Got]:
        fleet = self.fleet
        fleet.collect()
        found = {request.stream: Got() for request in self.requests}
        for frame in fleet.frames:
            at = 0
            for number, count in zip(frame.stream, frame.count or [1] * len(frame.stream), strict=True):
                found[number].tokens += frame.token[at : at + count]
                at += count
            for detail in frame.detail:
                found[detail.stream].rows += rows_of(detail.logprobs)
                found[detail.stream].prompt_rows += rows_of(detail.prompt_logprobs)
            for finish in frame.finish:
                found[finish.stream].ends.append(finish.reason)
        return list(found.values())


def undisturbed(kind: str, tokens: int, choice: int) -> Got:
    fields = KINDS[kind]
    seed = fields["seed"] + choice if "seed" in fields else 0
    stream = Stream(list(PROMPT), tokens, seed, 0, "structured_outputs" in fields, "logprobs" in fields, False)
    rows = [stream.make() for _ in range(tokens)]
    prompt = [row_of(PROMPT[: i + 1]) for i in range(len(PROMPT))] if "prompt_logprobs" in fields else []
    return Got(stream.tokens[len(PROMPT) :], rows if stream.scored else [], prompt, [LENGTH])


def compare(what: str, got: Sequence[object], expected: Sequence[object], outcome: Outcome) -> None:
    """By what is there at all first: what is missing, what came too often, then what stands in another place."""
    if list(got) == list(expected):
        return
    have, want = Counter(got), Counter(expected)
    lost, more = sum((want - have).values()), have - want
    doubled = sum(count for value, count in more.items() if value in want)
    outcome.lost += lost
    outcome.doubled += doubled
    outcome.wrong += max(int(not lost and not doubled), sum(more.values()) - doubled)
    outcome.problem(f"{what}: {len(got)} of {len(expected)}, {lost} lost, {doubled} doubled")


def one_run(kind: str, kills: tuple[int, ...], tokens: int, longest: int, seed: int, outcome: Outcome) -> None:
    """A request whose replica is killed once each of `kills` tokens were made there."""
    trial = Trial(kind, tokens, longest, random.Random(f"{seed} {kind} {kills} {longest}"))
    for made in kills:
        if not trial.until_made(made):
            break
        trial.kill()
        outcome.inputs += 1
    trial.finish()
    outcome.requests += trial.choices
    for choice, got in enumerate(trial.got()):
        expected = undisturbed(kind, tokens, choice)
        what = f"seed {seed}, {kind}, choice {choice}, killed at {kills}, up to {longest} tokens a step"
        for name in ("tokens", "rows", "prompt_rows", "ends"):
            compare(f"{what}: {name}", getattr(got, name), getattr(expected, name), outcome)
    trial.fleet.state.pages._reclaim()
    left = trial.fleet.state.live + trial.fleet.state.held + trial.fleet.state.pages.pages_in_use
    if left:
        outcome.leaked += left
        outcome.problem(f"seed {seed}, {kind}, killed at {kills}: {left} requests or pages are left")


async def run(scale: float) -> Outcome:
    """Every pair of positions in full; in short every position once, and pairs along the diagonal."""
    outcome = Outcome(simulated=True)
    seed = int(os.environ.get("MEGATOKEN_SEED", "1"))
    tokens = FULL_TOKENS if scale >= 1 else SHORT_TOKENS
    positions = range(tokens + 1)
    kills: list[tuple[int, ...]] = [(at,) for at in positions]
    # Twice before its first token is a request that costs two replicas: it ends, see campaign_poison.
    kills += [
        (first, second)
        for first in positions
        for second in positions
        if first + second and (scale >= 1 or abs(first - second) < 2)
    ]
    for kind in KINDS:
        for longest in (1, 3):
            for pair in kills:
                one_run(kind, pair, tokens, longest, seed, outcome)
            await asyncio.sleep(0)
    return outcome
