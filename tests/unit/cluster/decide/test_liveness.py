"""What counts as a hang, and when a lease is over, as a table of short stories."""

from __future__ import annotations

import pytest

from megatoken.cluster.decide.liveness import Answered, Hang, HangSeen, Liveness, LivenessLimits

LIMITS = LivenessLimits(lease_s=30.0, hang_s=60.0, probe_s=30.0)


def told(answers: list[tuple[float, int, int]]) -> Liveness:
    """(at, steps, unfinished) of replica r, that serves since 0."""
    liveness = Liveness()
    liveness.serves(["r"], 0.0)
    for at_s, steps, unfinished in answers:
        liveness.answered("r", Answered(at_s * 1000, steps, unfinished, at_s))
    return liveness


def every_second(until: int, steps: int | None, unfinished: int, since: int = 0) -> list[tuple[float, int, int]]:
    """Answers once a second; `steps` None: one step more each second."""
    return [(float(at), at if steps is None else steps, unfinished) for at in range(since, until + 1)]


@pytest.mark.parametrize(
    ("answers", "now", "hang"),
    [
        ([], 29.9, None),  # it began to serve just now
        ([], 30.0, Hang.NO_ANSWER),
        (every_second(100, 5, 0), 100.0, None),  # idle
        (every_second(100, None, 3), 100.0, None),  # busy
        (every_second(100, None, 1), 100.0, None),  # one long prefill: steps without a token
        (every_second(59, 5, 3), 59.9, None),
        (every_second(61, 5, 3), 61.0, Hang.NO_STEP),
        (every_second(40, 5, 0) + every_second(99, 5, 2, since=41), 99.0, None),  # the requests came at 41
        (every_second(40, 5, 0) + every_second(101, 5, 2, since=41), 101.0, Hang.NO_STEP),
        (every_second(100, None, 3), 129.9, None),
        (every_second(50, 5, 3), 79.9, None),  # silent since 50: whether it makes steps is not known
        (every_second(100, None, 3), 130.0, Hang.NO_ANSWER),
    ],
)
def test_a_hang_is_silence_or_an_engine_that_stands_still(
    answers: list[tuple[float, int, int]], now: float, hang: Hang | None
) -> None:
    seen = told(answers).hang("r", LIMITS, now)
    assert (seen.hang if seen else None) is hang


def test_an_idle_engine_is_asked_for_a_token_at_times_and_a_busy_one_never() -> None:
    idle = told(every_second(29, 7, 0))
    assert idle.to_probe(LIMITS, 29.0) == []
    assert idle.to_probe(LIMITS, 30.0) == ["r"]
    assert idle.to_probe(LIMITS, 59.9) == [], "it was asked at 30"
    assert idle.to_probe(LIMITS, 60.0) == ["r"]
    assert told(every_second(100, None, 2)).to_probe(LIMITS, 100.0) == []
    assert told(every_second(100, 7, 2)).to_probe(LIMITS, 100.0) == [], "it has requests to show whether it lives"
    assert Liveness().to_probe(LIMITS, 100.0) == []


def test_a_token_that_does_not_come_is_a_hang_until_a_step_is_made() -> None:
    liveness = told(every_second(31, 7, 0))
    liveness.probe_failed("r", 30.0)
    seen = liveness.hang("r", LIMITS, 90.0 - 61.0)
    assert seen is not None
    assert seen.hang is Hang.NO_TOKEN
    liveness.answered("r", Answered(1.0, 8, 0, 32.0))
    assert liveness.hang("r", LIMITS, 32.0) is None


def test_a_probe_that_others_requests_held_up_says_nothing() -> None:
    liveness = told([*every_second(31, 7, 0), (40.0, 8, 5), (50.0, 9, 5)])
    liveness.probe_failed("r", 31.0)
    assert liveness.hang("r", LIMITS, 51.0) is None


def test_a_lease_is_over_its_length_after_the_last_answer() -> None:
    liveness = told(every_second(10, 1, 0))
    assert liveness.stamp_s("r") == 10_000.0
    assert liveness.lease_until_s("r", LIMITS, 25.0) == 40.0
    assert Liveness().lease_until_s("r", LIMITS, 25.0) == 55.0, "a controller that began at 25 knows of no answer"
    assert Liveness().stamp_s("r") == 0.0
    liveness.serves([], 11.0)
    assert liveness.stamp_s("r") == 0.0, "forgotten"


def test_a_token_that_does_not_come_counts_from_when_it_was_asked_for_until_a_step_is_seen() -> None:
    seen = told(every_second(40, 7, 0))
    seen.probe_failed("r", 0.0)
    assert seen.hang("r", LIMITS, 45.0) is None, "a step was seen when it was asked"
    seen.probe_failed("r", 35.0)
    assert seen.hang("r", LIMITS, 45.0) == HangSeen(Hang.NO_TOKEN, 10.0)
    seen.answered("r", Answered(46_000.0, 8, 0, 46.0))
    assert seen.hang("r", LIMITS, 46.0) is None
    assert seen.to_probe(LIMITS, 75.9) == []
    assert seen.to_probe(LIMITS, 76.0) == ["r"], "it made a step at 46"


def test_requests_without_a_step_hang_from_the_very_second() -> None:
    still = told([(0.0, 5, 0), (59.9, 5, 3)])
    assert still.hang("r", LIMITS, 59.9) is None
    still.answered("r", Answered(60_000.0, 5, 3, 60.0))
    assert still.hang("r", LIMITS, 60.0) == HangSeen(Hang.NO_STEP, 60.0)
