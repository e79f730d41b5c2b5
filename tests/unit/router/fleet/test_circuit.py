"""When a circuit opens, for how long, and what makes it forget."""

from __future__ import annotations

import pytest

from megatoken.router.fleet.circuit import Circuit, CircuitState


def test_a_new_circuit_is_closed_and_without_a_pause() -> None:
    circuit = Circuit(3, 1.0, 8.0)
    assert (circuit.state, circuit.failures, circuit.pause_s, circuit.until_s) == (CircuitState.CLOSED, 0, 0.0, 0.0)


@pytest.mark.parametrize(("failures", "closed"), [(0, True), (1, True), (2, True), (3, False), (4, False)])
def test_it_opens_after_so_many_failures_in_a_row(failures: int, closed: bool) -> None:
    circuit = Circuit(3, 1.0, 8.0)
    for _ in range(failures):
        circuit.failed(10.0)
    assert (circuit.closed, circuit.failures) == (closed, failures)
    assert circuit.until_s == (0.0 if closed else 11.0)


def test_a_success_between_begins_the_count_anew() -> None:
    circuit = Circuit(3, 1.0, 8.0)
    for _ in range(3):
        circuit.failed(10.0)
        circuit.failed(10.0)
        circuit.succeeded()
    assert (circuit.closed, circuit.failures) == (True, 0)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_replica_that_hangs_opens_it_at_once(before: int) -> None:
    circuit = Circuit(3, 2.0, 8.0)
    for _ in range(before):
        circuit.failed(10.0)
    circuit.trip(20.0)
    assert (circuit.state, circuit.failures, circuit.until_s) == (CircuitState.OPEN, 3, 22.0)


def test_to_hang_while_it_is_open_lengthens_nothing() -> None:
    circuit = Circuit(1, 2.0, 8.0)
    circuit.failed(10.0)
    circuit.trip(11.0)
    assert (circuit.until_s, circuit.pause_s, circuit.failures) == (12.0, 2.0, 2)


@pytest.mark.parametrize(("now", "begins"), [(11.9, False), (12.0, True), (12.1, True)])
def test_a_probe_is_due_when_the_pause_is_over(now: float, begins: bool) -> None:
    circuit = Circuit(1, 2.0, 8.0)
    circuit.failed(10.0)
    assert circuit.begin_probe(now) is begins
    assert circuit.state is (CircuitState.HALF_OPEN if begins else CircuitState.OPEN)


def test_one_failed_probe_opens_it_again_for_twice_as_long_and_success_forgets_that() -> None:
    circuit = Circuit(3, 2.0, 30.0)
    circuit.trip(0.0)
    assert circuit.begin_probe(2.0)
    circuit.failed(3.0)
    assert (circuit.state, circuit.pause_s, circuit.until_s) == (CircuitState.OPEN, 4.0, 7.0)
    assert circuit.begin_probe(7.0)
    circuit.succeeded()
    assert (circuit.state, circuit.pause_s, circuit.failures) == (CircuitState.CLOSED, 0.0, 0)
    circuit.trip(10.0)
    assert circuit.until_s == 12.0


def test_a_first_pause_over_the_bound_is_the_bound() -> None:
    circuit = Circuit(1, 5.0, 3.0)
    circuit.failed(1.0)
    assert circuit.until_s == 4.0
