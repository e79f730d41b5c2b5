"""How a stream's end is put into a Finish: pure. Called by worker/replica.py."""

from __future__ import annotations

from megatoken.errors import OverloadError, grpc_status, status_number
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.engines.engine import Ended
from megatoken.worker.streams.table import Running


def end_of(ended: Ended, running: Running, *, stream: int, generated: int, replica: str) -> pb.Finish:
    """The Finish of a stream that ran. A resumed one's counts are those of the whole request."""
    request = running.request
    prompt_tokens = len(request.prompt) - request.resumed_tokens
    finish = pb.Finish(
        stream=stream,
        reason=ended.reason,  # type: ignore[arg-type]
        code=ended.code,
        message=ended.message,
        prompt_tokens=prompt_tokens,
        cached_tokens=min(running.cached_tokens, prompt_tokens),
        generated_tokens=generated + request.resumed_tokens,
        replica=replica,
        resume_note=request.resume_note,
    )
    if ended.stop_token is not None:
        finish.stop_token = ended.stop_token
    return finish


def refusal(stream: int, error: Exception, replica: str) -> pb.Finish:
    """The Finish of a stream that never ran."""
    finish = pb.Finish(
        stream=stream,
        reason=pb.FINISH_REASON_ERROR,
        code=status_number(error),
        message=grpc_status(error)[1],
        replica=replica,
    )
    if isinstance(error, OverloadError):
        finish.retry_after_ms = max(1, int(error.retry_after_s * 1000))
    return finish
