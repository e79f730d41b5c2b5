"""One JSON line a finished request: ids, counts and times; never a prompt, a token or a key."""

from __future__ import annotations

import logging
from typing import Final

from megatoken.log import log_event
from megatoken.router.core.request import Request
from megatoken.v1 import tokens_pb2

log = logging.getLogger(__name__)

REASONS: Final = {number: name for name, number in tokens_pb2.FinishReason.items()}


def log_request(request: Request, finish: tokens_pb2.Finish, now: float) -> None:
    """RouterState.on_finished when request_log is on."""
    log_event(
        log,
        "request.finished",
        request_id=request.request_id,
        choice=request.choice,
        model=request.pool.model,
        tenant=request.tenant,
        replica=finish.replica,
        reason=REASONS.get(finish.reason, str(finish.reason)),  # a newer worker may have more
        code=finish.code,
        prompt_tokens=finish.prompt_tokens,
        cached_tokens=finish.cached_tokens,
        generated_tokens=finish.generated_tokens,
        resumes=finish.resumes,
        queue_s=round(request.placed_s - request.arrived_s, 6) if request.placed_s else None,
        first_token_s=round(request.first_s - request.arrived_s, 6) if request.first_s else None,
        whole_s=round(now - request.arrived_s, 6),
    )
