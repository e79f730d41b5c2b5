"""A state machine's table: where it leads, what it prints, and what its error tells."""

from enum import StrEnum

import pytest

from megatoken.transitions import IllegalTransition, Transitions


class Light(StrEnum):
    GREEN = "green"
    RED = "red"
    BROKEN = "broken"


class Change(StrEnum):
    STOP = "stop"
    GO = "go"
    FAIL = "fail"


TABLE = Transitions(
    {
        (Light.GREEN, Change.STOP): Light.RED,
        (Light.GREEN, Change.FAIL): Light.BROKEN,
        (Light.RED, Change.GO): Light.GREEN,
    }
)


def test_it_leads_where_the_table_says() -> None:
    assert TABLE.next(Light.GREEN, Change.STOP) is Light.RED
    assert TABLE.legal()[Light.RED, Change.GO] is Light.GREEN


def test_an_error_tells_what_happened_before() -> None:
    with pytest.raises(IllegalTransition, match=r"^event go in state green; before it: stop, go$"):
        TABLE.next(Light.GREEN, Change.GO, (Change.STOP, Change.GO))
    with pytest.raises(IllegalTransition, match=r"^event go in state broken$"):
        TABLE.next(Light.BROKEN, Change.GO)


def test_it_prints_a_state_a_line() -> None:
    assert str(TABLE) == "green   stop -> red, fail -> broken\nred     go -> green\nbroken  (final)"
