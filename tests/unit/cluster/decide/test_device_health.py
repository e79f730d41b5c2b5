"""Devices on which replicas keep dying are left out, come back once checked, and answer for no broken model."""

from dataclasses import replace

import pytest

from megatoken.cluster.decide.device_health import (
    SETTLED_S,
    DeviceStrikes,
    DriverState,
    checked,
    due,
    judge,
    reported,
    with_devices_out,
)
from megatoken.cluster.decide.exit_cause import BY_ITSELF, ExitCause
from megatoken.cluster.decide.fleet import Fleet, Replica
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import Placement, Rank

NODES = Inventory((Node("n", "10.0.0.1", tuple(Device("mi355x", number) for number in range(8))),))
PAUSE_S = 60.0
BOOM = "exit status 1: RuntimeError: HIP error"


def replica(number: int, *devices: int, state: ReplicaState = ReplicaState.STARTING, revision: str = "r") -> Replica:
    ranks = tuple(Rank(rank, "n", device, "mi355x") for rank, device in enumerate(devices))
    return Replica(f"m-{number}", "m", revision, 1, Placement(f"m-{number}", "m", ranks), 0.0, state)


def die(
    book: DeviceStrikes,
    now: float,
    *devices: int,
    cause: ExitCause = ExitCause.PROGRAM_ENDED,
    beside: tuple[Replica, ...] = (),
) -> DeviceStrikes:
    """One replica on these devices fails."""
    one = replica(1, *devices)
    failed = replace(one, state=ReplicaState.FAILED, reason=BOOM, exit_cause=cause)
    return judge(book, Fleet((one, *beside)), Fleet((failed, *beside)), PAUSE_S, now)


def out(book: DeviceStrikes, now: float) -> list[int]:
    return [device.index for device in with_devices_out(NODES, book, now).nodes[0].devices if not device.healthy]


def why(book: DeviceStrikes, now: float) -> str:
    (device,) = (device for device in with_devices_out(NODES, book, now).nodes[0].devices if device.out)
    return device.out


SERVING = replica(9, 7, state=ReplicaState.READY)


def test_three_strikes_put_one_device_out_and_say_why() -> None:
    book = DeviceStrikes()
    for strike in range(3):
        assert out(book, 10.0) == []
        book = die(book, 10.0 + strike, 3, beside=(SERVING,))
    assert out(book, 13.0) == [3]
    assert why(book, 13.0) == f"replicas died here 3 times ({BOOM}); checked in 59 s"
    assert why(book, 12.0 + PAUSE_S) == f"replicas died here 3 times ({BOOM}); being checked"


def test_a_check_brings_it_back_and_one_more_strike_doubles_the_pause() -> None:
    book = DeviceStrikes()
    for _ in range(3):
        book = die(book, 0.0, 3, beside=(SERVING,))
    assert due(book, PAUSE_S - 0.1) == frozenset()
    assert due(book, PAUSE_S) == {("n", 3)}
    assert out(book, PAUSE_S + 1) == [3], "nothing has checked it"
    book = checked(book, ("n", 3), "", PAUSE_S, PAUSE_S + 1)
    assert out(book, PAUSE_S + 1) == []
    book = die(book, PAUSE_S + 2, 3, beside=(SERVING,))
    assert out(book, PAUSE_S + 2) == [3]
    assert due(book, 3 * PAUSE_S + 1.9) == frozenset()
    assert due(book, 3 * PAUSE_S + 2) == {("n", 3)}


def test_a_check_that_fails_keeps_it_out_for_twice_as_long() -> None:
    book = DeviceStrikes()
    for _ in range(3):
        book = die(book, 0.0, 3, beside=(SERVING,))
    book = checked(book, ("n", 3), "7 bytes of its memory did not keep", PAUSE_S, PAUSE_S)
    assert "a check: 7 bytes" in why(book, PAUSE_S)
    assert due(book, 3 * PAUSE_S - 0.1) == frozenset()
    assert due(book, 3 * PAUSE_S) == {("n", 3)}
    assert checked(book, ("n", 5), "", PAUSE_S, 0.0) == book, "nobody asked for that one"


def test_a_replica_that_serves_there_long_enough_clears_it() -> None:
    book = die(die(DeviceStrikes(), 0.0, 3), 0.0, 3)
    well = Fleet((replica(2, 3, state=ReplicaState.READY),))
    assert judge(book, well, well, PAUSE_S, SETTLED_S - 1).strikes
    assert not judge(book, well, well, PAUSE_S, SETTLED_S).strikes


@pytest.mark.parametrize("cause", ExitCause)
def test_the_cause_alone_says_what_is_a_strike(cause: ExitCause) -> None:
    assert bool(die(DeviceStrikes(), 0.0, 3, cause=cause).strikes) == (cause in BY_ITSELF)


def test_a_wide_replica_strikes_all_its_devices() -> None:
    book = DeviceStrikes()
    for _ in range(3):
        book = die(book, 0.0, 0, 1, beside=(SERVING,))
    assert out(book, 1.0) == [0, 1]


def test_a_model_that_fails_wherever_it_is_put_takes_no_device_down_with_it() -> None:
    book = DeviceStrikes()
    for device in (0, 1):
        for _ in range(3):
            book = die(book, 0.0, device)
    assert out(book, 1.0) == []
    assert book.blamed == {("m", "r")}
    for _ in range(9):
        book = die(book, 2.0, 5)
    assert out(book, 3.0) == []
    well = Fleet((SERVING,))
    assert not judge(book, well, well, PAUSE_S, 4.0).blamed


def test_devices_are_to_blame_while_the_same_revision_serves_elsewhere() -> None:
    book = DeviceStrikes()
    for device in (0, 1, 2):
        for _ in range(3):
            book = die(book, 0.0, device, beside=(SERVING,))
    assert out(book, 1.0) == [0, 1, 2]


def test_a_wide_model_is_blamed_only_once_two_of_its_places_are_out() -> None:
    book = DeviceStrikes()
    for _ in range(3):
        book = die(book, 0.0, 0, 1)
    assert not book.blamed
    assert out(book, 1.0) == [0, 1]
    for _ in range(3):
        book = die(book, 0.0, 2, 3)
    assert book.blamed == {("m", "r")}
    assert out(book, 1.0) == []


def test_new_memory_errors_put_a_device_out_until_a_check_passes_and_old_ones_do_not() -> None:
    book = reported(DeviceStrikes(), {("n", 2): DriverState(errors=7)}, PAUSE_S, 10.0)
    assert out(book, 10.0) == [], "of before the first look"
    book = reported(book, {("n", 2): DriverState(errors=9), ("n", 3): DriverState()}, PAUSE_S, 20.0)
    assert out(book, 20.0) == [2]
    assert why(book, 20.0) == "its driver: 2 memory errors that could not be corrected; checked in 60 s"
    assert due(book, 20.0 + PAUSE_S) == {("n", 2)}
    book = checked(book, ("n", 2), "", PAUSE_S, 90.0)
    assert out(book, 90.0) == []
    assert out(reported(book, {("n", 2): DriverState(errors=9)}, PAUSE_S, 100.0), 100.0) == []
    assert out(reported(book, {("n", 2): DriverState(errors=10)}, PAUSE_S, 100.0), 100.0) == [2]


def test_a_device_that_its_driver_gives_up_is_out_once_and_a_check_that_fails_keeps_it_out() -> None:
    lost = {("n", 4): DriverState(broken="the GPU has fallen off the bus")}
    book = reported(DeviceStrikes(), lost, PAUSE_S, 10.0)
    assert why(book, 10.0) == "its driver: the GPU has fallen off the bus; checked in 60 s"
    assert reported(book, lost, PAUSE_S, 40.0).strikes == book.strikes, "its pause does not begin anew"
    book = checked(book, ("n", 4), "its driver: the GPU has fallen off the bus", PAUSE_S, 70.0)
    assert why(book, 70.0) == "a check: its driver: the GPU has fallen off the bus; checked in 120 s"


def test_a_driver_and_replicas_that_died_are_one_account() -> None:
    book = reported(DeviceStrikes(), {("n", 3): DriverState(broken="x")}, PAUSE_S, 10.0)
    book = checked(book, ("n", 3), "", PAUSE_S, 80.0)
    book = die(book, 90.0, 3, beside=(SERVING,))
    assert why(book, 90.0) == f"replicas died here 1 times ({BOOM}); checked in 120 s", "it was out before"


def test_a_first_pause_may_be_longer_than_those_that_double() -> None:
    lost = {("n", 4): DriverState(broken="the GPU has fallen off the bus")}
    assert due(reported(DeviceStrikes(), lost, 7200.0, 10.0), 7209.0) == frozenset()
    assert due(reported(DeviceStrikes(), lost, 7200.0, 10.0), 7210.0) == {("n", 4)}
