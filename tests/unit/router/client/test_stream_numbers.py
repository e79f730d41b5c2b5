"""Stream numbers of a session: in a row, and around the end of 32 bits."""

from megatoken.router.client.columns import Numbers

END = 1 << 32


def test_numbers_are_given_in_a_row_and_are_the_sessions_own() -> None:
    numbers = Numbers(7, 7)
    assert [numbers.take(1), numbers.take(3), numbers.take(1)] == [7, 8, 11]
    assert [number in numbers for number in (6, 7, 11, 12)] == [False, True, True, False]


def test_the_choices_of_one_request_never_straddle_the_end() -> None:
    numbers = Numbers(END - 2, END - 2)
    assert [numbers.take(1), numbers.take(2), numbers.take(1)] == [END - 2, 1, 3]
    assert [number in numbers for number in (END - 3, END - 2, END - 1, 1, 3, 4)] == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]


def test_a_session_that_gave_none_has_none() -> None:
    assert 7 not in Numbers(7, 7)
    assert "7" not in Numbers(0, 9)
