"""The table of live streams: what a slot holds when it is taken, orphaned, freed, and after the table grew."""

from __future__ import annotations

import pytest

from megatoken.router.streams.slots import DIRECT, NOBODY, SlotTable


def row(table: SlotTable, slot: int) -> tuple[int, int, int, int, float, int, object]:
    columns = (table.sink, table.stream, table.replica, table.generated, table.last_s, table.page)
    return (*(column[slot].item() for column in columns), table.owner[slot])  # type: ignore[return-value]


def test_a_new_table_is_free() -> None:
    table = SlotTable(4)
    assert (table.size, table.taken) == (4, 0)
    assert [row(table, slot) for slot in range(4)] == [(NOBODY, 0, -1, 0, 0.0, -1, None)] * 4
    assert table.rank.tolist() == [0] * 4
    assert SlotTable().size == 1024


def test_the_sinks_that_are_no_session_are_below_all_indexes() -> None:
    assert (NOBODY, DIRECT) == (-1, -2)


def test_slots_are_taken_from_the_lowest_with_all_their_columns() -> None:
    table, owner = SlotTable(4), object()
    assert [table.take(5, 6, 7, owner, 8.5), table.take(1, 2, 3, owner, 4.0)] == [0, 1]
    assert row(table, 0) == (6, 7, 5, 0, 8.5, -1, owner)
    assert table.taken == 2


def test_a_slot_that_was_used_before_is_as_a_fresh_one() -> None:
    table = SlotTable(2)
    slot = table.take(5, 6, 7, object(), 8.5)
    table.generated[slot], table.page[slot] = 99, 3
    table.free(slot)
    assert (table.sink[slot], table.replica[slot], table.owner[slot], table.taken) == (NOBODY, -1, None, 0)
    owner = object()
    assert table.take(0, 0, 0, owner, 9.0) == slot
    assert row(table, slot) == (0, 0, 0, 0, 9.0, -1, owner)


@pytest.mark.parametrize("replica", [0, 1])
def test_a_slot_is_freed_once(replica: int) -> None:
    table = SlotTable(2)
    slot = table.take(replica, 0, 0, object(), 0.0)
    table.free(slot)
    with pytest.raises(RuntimeError, match=r"^slot 0 is free already$"):
        table.free(slot)
    assert table.taken == 0


def test_an_orphan_keeps_its_replica_and_belongs_to_nobody() -> None:
    table = SlotTable(2)
    slot = table.take(5, 6, 7, object(), 8.5)
    table.orphan(slot, 20.0)
    assert row(table, slot) == (NOBODY, 7, 5, 0, 20.0, -1, None)
    assert table.taken == 1


@pytest.mark.parametrize(("before_s", "found"), [(19.9, []), (20.0, []), (20.1, [1]), (30.0, [1]), (30.1, [1, 3])])
def test_orphans_are_found_by_since_when(before_s: float, found: list[int]) -> None:
    table = SlotTable(8)
    for sink in (0, 1, DIRECT, 3, 4):
        table.take(0, sink, 0, object(), 1.0)
    table.orphan(1, 20.0)
    table.orphan(3, 30.0)
    table.orphan(4, 2.0)
    table.free(4)
    assert table.orphans(before_s).tolist() == found


def test_the_slots_of_a_replica_are_found_orphans_included() -> None:
    table = SlotTable(8)
    for replica in (0, 1, 0, 1, 0):
        table.take(replica, 0, 0, object(), 1.0)
    table.orphan(2, 5.0)
    table.free(4)
    assert [table.of_replica(replica) for replica in (0, 1, 2)] == [[0, 2], [1, 3], []]


def test_a_full_table_doubles_and_keeps_what_it_has() -> None:
    table, owners = SlotTable(3), [object() for _ in range(4)]
    for number in range(3):
        table.take(number, 10 + number, 20 + number, owners[number], 30.0 + number)
        table.generated[number], table.page[number], table.rank[number] = 40 + number, 50 + number, 60 + number
    types = [column.dtype for column in (table.sink, table.stream, table.replica, table.generated, table.last_s)]
    assert (table.size, table.taken) == (3, 3)
    assert table.take(9, 9, 9, owners[3], 9.0) == 3
    assert (table.size, table.taken) == (6, 4)
    for number in range(3):
        expected = (10 + number, 20 + number, number, 40 + number, 30.0 + number, 50 + number, owners[number])
        assert row(table, number) == expected
    assert row(table, 3) == (9, 9, 9, 0, 9.0, -1, owners[3])
    assert [row(table, slot) for slot in (4, 5)] == [(NOBODY, 0, -1, 0, 0.0, -1, None)] * 2
    assert table.rank.tolist() == [60, 61, 62, 0, 0, 0]
    assert [
        column.dtype for column in (table.sink, table.stream, table.replica, table.generated, table.last_s)
    ] == types
    assert len(table.owner) == 6
    assert [table.take(0, 0, 0, None, 0.0) for _ in range(3)] == [4, 5, 6]
    assert table.size == 12
