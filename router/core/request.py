"""One stream of one caller's request, from arrival to its Finish. With n > 1 each choice is a Request of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from megatoken.router.core.lifecycle import LIFECYCLE, RequestEvent, RequestState
from megatoken.router.identity.callers import Caller

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Endpoint, Pool


class Sink(Protocol):
    """Where a request's answer goes: a client session, or the call of a Generate."""

    def push_tokens(self, request: Request, packed: bytes, details: list[bytes]) -> None:
        """Tokens of a request whose slot is DIRECT, and the encoded Details that belong to them."""

    def push_finish(self, request: Request, finish: bytes) -> None:
        """An encoded Finish, its stream already the client's. The last thing that comes for the request."""


@dataclass(slots=True)
class Request:
    """`raw` is the encoded GenerateRequest as it goes to a worker; the prompt is decoded only when it must be."""

    request_id: str
    sink: Sink
    sink_index: int  # of the session, or DIRECT
    stream: int  # the client's number
    choice: int
    pool: Pool
    raw: bytes
    prompt_tokens: int
    max_tokens: int  # at most this many more tokens
    expected_tokens: int  # of max_tokens, as far as one can tell
    priority: int
    caller: Caller
    affinity: str
    lora: str
    site: str
    resume: bool
    replay: bool  # sampling has state: go on elsewhere by making the same tokens again
    delivery: int
    max_delay_s: float
    deadline_s: float  # monotonic; inf: none
    arrived_s: float
    state: RequestState = RequestState.QUEUED
    slot: int = -1
    replica: Endpoint | None = None
    placed_s: float = 0.0
    first_s: float = 0.0  # 0: no token yet
    first_on_replica: bool = False  # this attempt has had its first token
    base_tokens: int = 0  # generated on earlier replicas and part of this attempt's prompt
    charged_prompt: int = 0  # what this attempt adds to its replica's outstanding prompt tokens
    charged_decode: int = 0
    resumes: int = 0
    resume_note: str = ""
    replayed: bytes = b""  # packed tokens that a replay must make again before new ones count
    replay_at: int = 0  # bytes of `replayed` seen again
    sent_tokens: int = 0  # with held delivery: passed on so far
    held_details: list[bytes] = field(default_factory=list)
    hold_due: bool = False  # stands in the heap of holds
    prompt_rows: int = 0  # of the prompt's log probabilities that the client has had, over all attempts
    prompt_rows_here: int = 0  # that this attempt has sent
    carried: bytes = b""  # packed tokens so far while it waits between replicas
    tried: list[int] = field(default_factory=list)  # replicas that lost it
    suspected_of: str = ""  # the replica that died before giving it a token; empty: none, or it is cleared
    prefix_hashes: tuple[int, ...] = ()
    attempts: int = 0
    span: Any = None  # of whoever traces it
    history: list[RequestEvent] = field(default_factory=list)  # bounded, since a request moves so many times at most

    def move(self, event: RequestEvent) -> None:
        """Raises IllegalTransition, with what happened before."""
        self.state = LIFECYCLE.next(self.state, event, self.history)
        self.history.append(event)

    @property
    def tenant(self) -> str:
        """Whom it counts for: the unit of fairness."""
        return self.caller.tenant

    @property
    def cost_tokens(self) -> int:
        """What it may cost a replica from the start: the unit of admission and fairness."""
        return self.prompt_tokens + self.expected_tokens
