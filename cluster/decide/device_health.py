"""Which devices to leave out, because replicas keep dying on them. Pure; the controller calls it after every tick.

A replica that ends by itself while it starts or serves is a strike against each of its devices. STRIKES in a row put a
device out for a pause (`pause_s`), and then until a check of it passes; back in service, one more strike puts it out
again for twice as long, and so does a check that fails. A replica that serves on it for SETTLED_S clears it.

What a device's driver says counts by itself (`reported`): memory errors that ECC could not mend since the last look, or
a device that the driver gives up, put it out at once. Nothing that runs there is ended for it.

Not strikes: a lost node, a kill from outside (SIGKILL says nothing of the device), a drain. A model that fails
wherever it is put is not the devices' fault: once two of its replicas' worth of devices would be out without one
replica of that revision serving, they are given back and that revision strikes no more until it serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megatoken.backoff import doubling_pause_s
from megatoken.cluster.decide.exit_cause import BY_ITSELF
from megatoken.cluster.decide.fleet import Fleet, Replica
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.inventory.topology import Inventory

STRIKES = 3
PAUSE_MAX_S = 3600.0
SETTLED_S = 30.0
REPLICAS_UNTIL_BLAMED = 2

Place = tuple[str, int]
"""(node id, device index)"""
Revision = tuple[str, str]
"""(model, revision)"""


@dataclass(frozen=True, slots=True)
class DriverState:
    """What a driver says of one device."""

    errors: int = 0
    """Memory errors that ECC could not mend, since the driver was loaded."""
    broken: str = ""
    """Why it gives the device up."""


@dataclass(frozen=True, slots=True)
class Strikes:
    """What is held against one device."""

    count: int = 0
    pauses: int = 0
    out: bool = False
    out_until_s: float = 0.0
    """With `out`: when it may be checked."""
    reason: str = ""
    by: Revision = ("", "")


@dataclass(frozen=True, slots=True)
class DeviceStrikes:
    """Strikes by device, and the revisions that are themselves to blame."""

    strikes: Mapping[Place, Strikes] = field(default_factory=dict)
    blamed: frozenset[Revision] = frozenset()
    errors: Mapping[Place, int] = field(default_factory=dict)
    """Uncorrected memory errors at the last look."""


def judge(book: DeviceStrikes, before: Fleet, after: Fleet, pause_s: float, now: float) -> DeviceStrikes:
    """The book after one tick turned `before` into `after`."""
    strikes, blamed = dict(book.strikes), set(book.blamed)
    serving: set[Revision] = set()
    for replica in after.replicas:
        if replica.state is ReplicaState.READY:
            serving.add((replica.model, replica.revision))
            if now - replica.since_s >= SETTLED_S:
                for place in _places(replica):
                    strikes.pop(place, None)
    blamed -= serving
    earlier = {replica.id: replica.state for replica in before.replicas}
    for replica in after.replicas:
        revision = (replica.model, replica.revision)
        if _died_by_itself(replica, earlier.get(replica.id)) and revision not in blamed:
            for place in _places(replica):
                strikes[place] = _struck(strikes.get(place, Strikes()), replica, pause_s, now)
            if revision not in serving and _is_to_blame(strikes, revision, len(_places(replica))):
                blamed.add(revision)
                strikes = {place: entry for place, entry in strikes.items() if entry.by != revision}
    return replace(book, strikes=strikes, blamed=frozenset(blamed))


def reported(book: DeviceStrikes, states: Mapping[Place, DriverState], pause_s: float, now: float) -> DeviceStrikes:
    """The book after drivers were asked. Errors of before the first look are nobody's news."""
    strikes = dict(book.strikes)
    for place, state in states.items():
        new = state.errors - book.errors.get(place, state.errors)
        entry = strikes.get(place, Strikes())
        if entry.out or not (state.broken or new > 0):
            continue
        text = state.broken or f"{new} memory errors that could not be corrected"
        strikes[place] = _paused(replace(entry, reason=f"its driver: {text}"), pause_s, now)
    errors = {place: state.errors for place, state in states.items()}
    return replace(book, strikes=strikes, errors={**book.errors, **errors})


def due(book: DeviceStrikes, now: float) -> frozenset[Place]:
    """Devices whose pause is over: a check decides whether they come back."""
    return frozenset(place for place, entry in book.strikes.items() if entry.out and entry.out_until_s <= now)


def checked(book: DeviceStrikes, place: Place, problem: str, pause_s: float, now: float) -> DeviceStrikes:
    """The book after a check of a device that was due. `problem`: what it found; empty: the device is well."""
    entry = book.strikes.get(place)
    if entry is None or not entry.out:
        return book
    failed = replace(entry, reason=f"a check: {problem}")
    after = _paused(failed, pause_s, now) if problem else replace(entry, out=False)
    return replace(book, strikes={**book.strikes, place: after})


def with_devices_out(inventory: Inventory, book: DeviceStrikes, now: float) -> Inventory:
    """The inventory with the devices that the book leaves out marked, and why."""
    out = {place: entry for place, entry in book.strikes.items() if entry.out}
    if not out:
        return inventory
    nodes = []
    for node in inventory.nodes:
        devices = tuple(
            replace(device, out=_why(out[node.id, device.index], now))
            if (node.id, device.index) in out and not device.out
            else device
            for device in node.devices
        )
        nodes.append(replace(node, devices=devices))
    return Inventory(tuple(nodes))


def _places(replica: Replica) -> list[Place]:
    return [(rank.node, rank.device) for rank in replica.placement.ranks]


def _died_by_itself(replica: Replica, earlier: ReplicaState | None) -> bool:
    was_up = earlier in (ReplicaState.STARTING, ReplicaState.READY)
    return was_up and replica.state is ReplicaState.FAILED and replica.exit_cause in BY_ITSELF


def _struck(entry: Strikes, replica: Replica, pause_s: float, now: float) -> Strikes:
    count, by = entry.count + 1, (replica.model, replica.revision)
    if count < STRIKES and not entry.pauses:
        return replace(entry, count=count, reason=replica.reason, by=by)
    return _paused(replace(entry, count=count, reason=replica.reason, by=by), pause_s, now)


def _paused(entry: Strikes, pause_s: float, now: float) -> Strikes:
    this_s = doubling_pause_s(entry.pauses + 1, pause_s, max(pause_s, PAUSE_MAX_S))
    return replace(entry, pauses=entry.pauses + 1, out=True, out_until_s=now + this_s)


def _is_to_blame(strikes: Mapping[Place, Strikes], revision: Revision, width: int) -> bool:
    out = sum(1 for entry in strikes.values() if entry.by == revision and entry.out)
    return out >= REPLICAS_UNTIL_BLAMED * width


def _why(entry: Strikes, now: float) -> str:
    left_s = entry.out_until_s - now
    then = f"checked in {left_s:.0f} s" if left_s > 0 else "being checked"
    died = f"replicas died here {entry.count} times ({entry.reason})" if entry.count else entry.reason
    return f"{died}; {then}"
