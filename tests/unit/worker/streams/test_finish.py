"""How a stream that never ran is ended."""

import pytest

from megatoken.errors import OverloadError, UnavailableError
from megatoken.worker.streams.finish import refusal


@pytest.mark.parametrize(("retry_after_s", "said_ms"), [(0.0, 1), (0.0005, 1), (0.25, 250), (3.0, 3000)])
def test_an_overload_says_in_milliseconds_when_to_come_again(retry_after_s: float, said_ms: int) -> None:
    finish = refusal(7, OverloadError("full", retry_after_s), "m-1")
    assert (finish.stream, finish.retry_after_ms, finish.replica) == (7, said_ms, "m-1")


def test_another_error_does_not() -> None:
    assert refusal(7, UnavailableError("gone"), "m-1").retry_after_ms == 0
