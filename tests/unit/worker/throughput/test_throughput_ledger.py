"""The node's ledger: what counts, once, for good."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatoken.counters import INDEX, NAMES, CounterWriter
from megatoken.worker.throughput.counter_files import CounterFiles, ledger_id
from megatoken.worker.throughput.decide.ledger import SHOWN_S, WIDTH, NodeLedger, Totals, Writer


def worker(name: str = "r0", incarnation: int = 1, model: str = "m") -> Writer:
    return Writer("worker", name, incarnation, model, "simulated", "cpu", 1)


def totals(**named: int) -> Totals:
    values = np.zeros(WIDTH, np.int64)
    for name, value in named.items():
        values[INDEX[name]] = value
    return values


def test_incarnations_add_up_and_a_dead_writer_stays() -> None:
    ledger = NodeLedger()
    ledger.record([(worker(incarnation=1), totals(generated_tokens=10))], 0.0)
    ledger.record([(worker(incarnation=2), totals(generated_tokens=3))], 1.0)  # the first file is gone
    sums = ledger.sums(1.0, None)
    assert sums.models["m"][INDEX["generated_tokens"]] == 13
    assert sums.replicas["r0"][1][INDEX["generated_tokens"]] == 13
    assert sums.replicas["r0"][0].incarnation == 2


def test_routers_have_columns_of_their_own() -> None:
    ledger = NodeLedger()
    router = Writer("router", "router-0", 1)
    ledger.record([(worker(), totals(generated_tokens=7)), (router, totals(generated_tokens=5))], 0.0)
    sums = ledger.sums(0.0, None)
    assert sums.routers[INDEX["generated_tokens"]] == 5
    assert sums.models["m"][INDEX["generated_tokens"]] == 7


def test_a_counter_that_goes_backwards_is_named_once_and_counts_nothing_twice() -> None:
    ledger = NodeLedger()
    ledger.record([(worker(), totals(generated_tokens=100))], 0.0)
    fallen = ledger.record([(worker(), totals(generated_tokens=40))], 1.0)
    assert [str(fall) for fall in fallen] == [
        "generated_tokens of worker r0 (incarnation 1) went backwards from 100 to 40; 100 is kept"
    ]
    assert ledger.record([(worker(), totals(generated_tokens=60))], 2.0) == []
    assert ledger.sums(2.0, None).models["m"][INDEX["generated_tokens"]] == 100
    ledger.record([(worker(), totals(generated_tokens=130))], 3.0)
    assert ledger.sums(3.0, None).models["m"][INDEX["generated_tokens"]] == 130


def test_a_negative_counter_counts_as_none() -> None:
    ledger = NodeLedger()
    fallen = ledger.record([(worker(), totals(prompt_tokens=-5))], 0.0)
    assert [fall.name for fall in fallen] == ["prompt_tokens"]
    assert ledger.sums(0.0, None).models["m"][INDEX["prompt_tokens"]] == 0


def test_a_replica_keeps_its_row_while_it_serves_or_moved_lately() -> None:
    ledger = NodeLedger()
    ledger.record([(worker("idle"), totals(generated_tokens=1)), (worker("gone"), totals(generated_tokens=2))], 0.0)
    assert set(ledger.sums(1.0, frozenset()).replicas) == {"idle", "gone"}
    later = ledger.sums(SHOWN_S + 1, frozenset({"idle"}))
    assert set(later.replicas) == {"idle"}
    assert later.models["m"][INDEX["generated_tokens"]] == 3


@given(st.lists(st.lists(st.integers(-5, 1000), min_size=WIDTH, max_size=WIDTH), min_size=1, max_size=20))
def test_totals_never_go_backwards(readings: list[list[int]]) -> None:
    ledger = NodeLedger()
    last = np.zeros(WIDTH, np.int64)
    for step, values in enumerate(readings):
        ledger.record([(worker(), np.array(values, np.int64))], float(step))
        now = ledger.sums(float(step), None).models["m"]
        assert (now >= last).all()
        assert (now == np.maximum.reduce([np.zeros(WIDTH, np.int64), *map(np.array, readings[: step + 1])])).all()
        last = now


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ({"kind": "cat", "id": "a", "incarnation": 1}, "kind is 'cat'"),
        ({"kind": "worker", "id": "", "incarnation": 1}, "id is ''"),
        ({"kind": "worker", "id": "a", "incarnation": "x"}, "incarnation is 'x'"),
    ],
)
def test_a_header_that_does_not_fit_is_named(header: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Writer.of_header(header)


def test_files_outlive_their_writer_and_bad_ones_are_named_once(tmp_path) -> None:
    header = {"kind": "worker", "id": "r0", "incarnation": 7, "model": "m", "devices": ["a:0", "a:1"]}
    writer = CounterWriter(tmp_path / "r0.7.counters", header)
    writer.totals[INDEX["generated_tokens"]] = 42
    writer.close()
    (tmp_path / "short.1.counters").write_bytes(b"mtcount1")
    (tmp_path / "r1.1.counters.new").write_bytes(b"half a file")
    files = CounterFiles(tmp_path)
    for _ in range(2):
        ((found, values),) = files.read()
        assert (found.id, found.incarnation, found.devices) == ("r0", 7, 2)
        assert dict(zip(NAMES, values.tolist(), strict=True))["generated_tokens"] == 42
    assert len(files.problems) == 1
    assert "short.1.counters is not counted: 8 bytes" in files.problems[0]


def test_a_truncated_file_does_not_end_the_reader(tmp_path) -> None:
    writer = CounterWriter(tmp_path / "r0.1.counters", {"kind": "worker", "id": "r0", "incarnation": 1})
    files = CounterFiles(tmp_path)
    assert len(files.read()) == 1
    with open(writer.path, "r+b") as file:
        file.truncate(100)
    assert files.read() == []
    assert len(files.problems) == 1


def test_with_more_files_than_a_tick_reads_each_has_its_turn_and_a_new_one_is_first(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("megatoken.worker.throughput.counter_files.MAX_FILES", 2)

    def write(name: str) -> None:
        CounterWriter(tmp_path / f"{name}.1.counters", {"kind": "worker", "id": name, "incarnation": 1}).close()

    files = CounterFiles(tmp_path)
    for name in ("a", "b", "c", "d", "e"):
        write(name)
    seen = [[writer.id for writer, _ in files.read()] for _ in range(3)]
    assert seen == [["a", "b"], ["c", "d"], ["e", "a"]]
    write("z")
    assert [writer.id for writer, _ in files.read()] == ["z", "b"]
    assert len(files.problems) == 1, "said once"


def test_a_directory_keeps_its_identity(tmp_path) -> None:
    first = ledger_id(tmp_path / "counters")
    assert ledger_id(tmp_path / "counters") == first
    assert ledger_id(tmp_path / "other") != first
    assert CounterFiles(tmp_path / "missing").read() == []


@pytest.mark.parametrize("length", [1, 256])
def test_an_id_of_every_allowed_length_is_taken(length: int) -> None:
    header = {"kind": "router", "id": "x" * length, "incarnation": 3}
    assert Writer.of_header(header) == Writer("router", "x" * length, 3, "", "", "", 1)


@pytest.mark.parametrize("name", ["", "x" * 257, 7, None])
def test_an_id_of_another_length_or_type_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"it must be a text of 1 to 256 characters"):
        Writer.of_header({"kind": "worker", "id": name, "incarnation": 1})


def test_a_headers_texts_are_kept_up_to_their_bound() -> None:
    header = {"kind": "worker", "id": "r", "incarnation": 1, "model": "m", "engine": "e" * 300, "device_kind": None}
    assert Writer.of_header(header) == Writer("worker", "r", 1, "m", "e" * 256, "", 1)


@pytest.mark.parametrize(
    ("devices", "count"), [({}, 1), ({"devices": 3}, 3), ({"devices": ["a:0", "a:1"]}, 2), ({"devices": "many"}, 1)]
)
def test_devices_are_counted_or_taken_as_one(devices: dict[str, object], count: int) -> None:
    assert Writer.of_header({"kind": "worker", "id": "r", "incarnation": 1, **devices}).devices == count


def test_every_fall_is_counted_with_what_was_before() -> None:
    ledger = NodeLedger()
    assert ledger.falls == 0
    (first,) = ledger.record([(worker(), totals(prompt_tokens=-5))], 0.0)
    assert (first.was, first.now) == (0, -5)
    assert ledger.falls == 1
    ledger.record([(worker(), totals(prompt_tokens=9, generated_tokens=4))], 1.0)
    assert ledger.falls == 1
    fallen = ledger.record([(worker(), totals(prompt_tokens=8, generated_tokens=3))], 2.0)
    assert {(fall.name, fall.was, fall.now) for fall in fallen} == {("prompt_tokens", 9, 8), ("generated_tokens", 4, 3)}
    assert ledger.falls == 3


@pytest.mark.parametrize(("after_s", "shown"), [(SHOWN_S - 1, True), (SHOWN_S, False), (SHOWN_S + 1, False)])
@pytest.mark.parametrize("serving", [None, frozenset[str]()])
def test_a_row_leaves_when_nothing_moved_for_the_longest_window(
    after_s: float, shown: bool, serving: frozenset[str] | None
) -> None:
    ledger = NodeLedger()
    ledger.record([(worker(), totals(generated_tokens=1))], 0.0)
    ledger.record([(worker(), totals(generated_tokens=2))], 200.0)
    ledger.record([(worker(), totals(generated_tokens=2))], 400.0)
    assert ("r0" in ledger.sums(200.0 + after_s, serving).replicas) is shown


def test_all_routers_are_summed_and_workers_after_them_count() -> None:
    ledger = NodeLedger()
    routers = [(Writer("router", f"router-{n}", 1), totals(generated_tokens=10**n)) for n in range(3)]
    ledger.record([*routers, (worker(model="b"), totals(generated_tokens=5))], 0.0)
    ledger.record([(worker("r1", model="a"), totals(generated_tokens=6))], 0.0)
    sums = ledger.sums(0.0, None)
    assert sums.routers[INDEX["generated_tokens"]] == 111
    assert {name: int(row[INDEX["generated_tokens"]]) for name, row in sums.models.items()} == {"a": 6, "b": 5}
    assert list(sums.models) == ["a", "b"]


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_the_newest_incarnation_speaks_for_a_replica_in_whatever_order_they_were_read(order: tuple[int, ...]) -> None:
    ledger = NodeLedger()
    for incarnation in order:
        ledger.record([(worker(incarnation=incarnation), totals(generated_tokens=1))], 0.0)
    assert ledger.sums(0.0, None).replicas["r0"][0].incarnation == 3
