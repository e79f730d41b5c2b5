"""Which rows of a prompt's log probabilities a request that goes on elsewhere still has to be given. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatoken.tokens.continuation import drop_first

if TYPE_CHECKING:
    from megatoken.router.core.request import Request
    from megatoken.v1 import tokens_pb2


def new_prompt_rows(request: Request, detail: tokens_pb2.Detail) -> bool:
    """Leaves in a Detail the prompt's rows that the client has not had; whether anything is left of it at all.

    They come ahead of the first token, so an attempt that ends before that token has perhaps sent some or all of them,
    and the next attempt, which is sent the request as it was, sends them again.
    """
    rows = len(detail.prompt_logprobs.rank)
    old = min(rows, max(0, request.prompt_rows - request.prompt_rows_here))
    request.prompt_rows_here += rows
    request.prompt_rows = max(request.prompt_rows, request.prompt_rows_here)
    if old == rows:
        detail.ClearField("prompt_logprobs")
    elif old:
        drop_first(detail.prompt_logprobs, old)
    return old < rows or bool(detail.logprobs.rank)
