"""Totals by name, in memory of their own where no counter file is shared."""

from __future__ import annotations

from megatoken.counters import NAMES
from megatoken.router.streams.ledger import RouterLedger


def test_totals_begin_at_nothing_and_each_is_added_to_by_itself() -> None:
    ledger = RouterLedger()
    assert [ledger[name] for name in NAMES] == [0] * len(NAMES)
    for amount, name in enumerate(NAMES):
        ledger.add(name, amount)
        ledger.add(name)
    ledger.add(NAMES[0], 2**40)
    assert [ledger[name] for name in NAMES] == [2**40 + 1, *range(2, len(NAMES) + 1)]


def test_what_is_no_counter_begins_at_nothing() -> None:
    ledger = RouterLedger()
    found = (ledger.refused, ledger.resumes, ledger.delivered_tokens, ledger.connection_faults, ledger.foreign_tokens)
    assert found == (0, 0, 0, 0, 0)
