"""Held delivery: passes on what is kept back of a stream, wherever it stands just then.

Called when the first token came, when the delay is over (upkeep), and at every kind of end (finishes, ending): what
Finish.generated_tokens counts, the client has been given.
"""

from __future__ import annotations

from typing import Final

from megatoken.router.core.request import Request
from megatoken.router.core.state import RouterState

MOST_TOKENS: Final = 1 << 17  # in one piece: half a MiB, well under any message limit


def flush_held(state: RouterState, request: Request) -> None:
    """Passes on all tokens that were made and that the client has not had.

    Between two replicas they are `carried`, in a replay `replayed`, and otherwise in the history.
    """
    elsewhere = request.carried or request.replayed
    total = len(elsewhere) // 4
    if not elsewhere:
        total = int(state.slots.generated[request.slot]) if request.slot >= 0 else 0
    if total <= request.sent_tokens:
        return
    state.ledger.delivered_tokens += total - request.sent_tokens
    details, request.held_details = request.held_details, []
    while request.sent_tokens < total:
        since, until = request.sent_tokens, min(total, request.sent_tokens + MOST_TOKENS)
        packed = elsewhere[4 * since : 4 * until] or state.pages.read(request.slot, since, until).tobytes()
        request.sent_tokens = until
        request.sink.push_tokens(request, packed, details if until == total else [])
