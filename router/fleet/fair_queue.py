"""The queue of one model: priorities first, then fair between tenants by tokens (start-time fair queueing).

Each tenant's virtual time moves by the tokens it was served; the waiting request with the smallest start tag goes
next, so a tenant with a thousand waiting requests and one with a single request take turns. Bounded by the caller
(router/admission/admission.py). Suspects (router/core/quarantine.py) wait apart: `peek` and `pop` pass them over.
Cancelled entries are dropped when they come to the front, or all together once they are the more.
"""

from __future__ import annotations

import heapq
from collections import deque
from itertools import count
from typing import Any, Final, Protocol

_FEW: Final = 64  # removed entries that are not worth a clean-up


class Queued(Protocol):
    @property
    def priority(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def cost_tokens(self) -> int: ...


class FairQueue:
    """push, peek, pop, remove are O(log n) amortised."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Any]] = []
        self._order = count()
        self._front = deque[Any]()  # resumed requests: before everyone
        self._suspects = dict[int, Any]()  # by identity, in order of arrival
        self._finish: dict[str, float] = {}
        self._clock = 0.0
        self._gone: set[int] = set()
        self._here: set[int] = set()  # those that wait
        self.length = 0
        self.tokens = 0

    def __len__(self) -> int:
        return self.length

    def push(self, item: Queued, weight: float = 1.0) -> None:
        tenant, priority = item.tenant, item.priority
        start = max(self._clock, self._finish.get(tenant, 0.0))
        self._enters(item)
        self._finish[tenant] = start + item.cost_tokens / weight
        heapq.heappush(self._heap, (priority, start, next(self._order), item))

    def push_front(self, item: Queued) -> None:
        """For a request that already ran: it was fair before."""
        self._enters(item)
        self._front.append(item)

    def push_suspect(self, item: Queued) -> None:
        """For a request that needs a replica to itself."""
        self._enters(item)
        self._suspects[id(item)] = item

    @property
    def suspects(self) -> int:
        return len(self._suspects)

    def first_suspect(self) -> Any | None:
        return next(iter(self._suspects.values()), None)

    def pop_suspect(self) -> Any:
        item = next(iter(self._suspects.values()))
        self._leaves(item)
        del self._suspects[id(item)]
        return item

    def peek(self) -> Any | None:
        while self._front and id(self._front[0]) in self._gone:
            self._gone.discard(id(self._front.popleft()))
        if self._front:
            return self._front[0]
        while self._heap and id(self._heap[0][3]) in self._gone:
            self._gone.discard(id(heapq.heappop(self._heap)[3]))
        return self._heap[0][3] if self._heap else None

    def pop(self) -> Any | None:
        item = self.peek()
        if item is None:
            return None
        self._leaves(item)
        if self._front:
            self._front.popleft()
        else:
            _, start, _, _ = heapq.heappop(self._heap)
            self._clock = max(self._clock, start)
            if not self._heap:  # nobody waits: forget who had how much
                self._finish.clear()
                self._clock = 0.0
        return item

    def remove(self, item: Queued) -> None:
        """Takes a request out wherever it stands; nothing, when it does not wait here."""
        if id(item) not in self._here:
            return
        self._leaves(item)
        if self._suspects.pop(id(item), None) is not None:
            return
        self._gone.add(id(item))
        if len(self._gone) > _FEW and len(self._gone) > self.length:
            self._drop_gone()

    def _drop_gone(self) -> None:
        """Makes heap and front anew without those that were removed: each is looked at once for itself and one more."""
        gone = self._gone
        self._heap = [entry for entry in self._heap if id(entry[3]) not in gone]
        heapq.heapify(self._heap)
        self._front = deque(item for item in self._front if id(item) not in gone)
        gone.clear()

    def items(self) -> list[Any]:
        """All that wait, in no particular order."""
        everything = [*self._front, *(entry[3] for entry in self._heap)]
        return [*self._suspects.values(), *(item for item in everything if id(item) not in self._gone)]

    # Whatever may raise comes first: one that is counted is there, and one that is not there is not counted.

    def _enters(self, item: Queued) -> None:
        cost_tokens = item.cost_tokens
        self._here.add(id(item))
        self.length += 1
        self.tokens += cost_tokens

    def _leaves(self, item: Queued) -> None:
        cost_tokens = item.cost_tokens
        self._here.discard(id(item))
        self.length -= 1
        self.tokens -= cost_tokens
