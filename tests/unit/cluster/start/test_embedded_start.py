"""A local Ray that gave up on its own raylet is started again, a bounded number of times; any other error is not."""

import subprocess

import pytest

from megatoken.cluster.start.owner import RAY_ATTEMPTS, start_patiently

GAVE_UP = "The current node timed out during startup. This could happen because ..."


def test_it_tries_again_and_kills_what_the_failed_attempt_left() -> None:
    left: list[subprocess.Popen[bytes]] = []

    def begin() -> None:
        if not left:
            left.append(subprocess.Popen(["sleep", "60"]))
            raise Exception(GAVE_UP)

    start_patiently(begin)
    assert left[0].wait(10) == -9


def test_it_gives_up_in_the_end_and_at_once_for_another_error() -> None:
    calls = []

    def begin(text: str) -> None:
        calls.append(text)
        raise Exception(text)

    with pytest.raises(Exception, match="timed out during startup"):
        start_patiently(lambda: begin(GAVE_UP))
    assert len(calls) == RAY_ATTEMPTS
    with pytest.raises(Exception, match="no such option"):
        start_patiently(lambda: begin("no such option"))
    assert len(calls) == RAY_ATTEMPTS + 1
