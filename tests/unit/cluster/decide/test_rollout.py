"""What one model does next, as a table: replicas as they are, and the step that follows."""

from __future__ import annotations

from typing import Any

import pytest

from megatoken.cluster.decide.fleet import ModelHealth, Replica
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.decide.rollout import RolloutStep, next_step
from megatoken.cluster.placement.place import Placement
from megatoken.cluster.spec.model import ModelSpec, UpdateSpec

NOW = 1000.0


def model(wanted: int, surge: int = 1, attempts: int = 2) -> ModelSpec:
    return ModelSpec(name="m", engine="simulated", replicas=wanted, update=UpdateSpec(surge=surge, attempts=attempts))


def replica(word: str, revision: str) -> Replica:
    """A letter for its state (below; a capital: of an old revision) and its serial number."""
    state = {
        "r": ReplicaState.READY,
        "b": ReplicaState.STARTING,
        "v": ReplicaState.RESERVING,
        "d": ReplicaState.DRAINING,
        "f": ReplicaState.FAILED,
    }[word[0].lower()]
    serial = int(word[1:])
    return Replica(
        f"m-{serial}",
        "m",
        "older" if word[0].isupper() else revision,
        1,
        Placement(f"m-{serial}", "m", ()),
        created_s=float(serial),
        state=state,
    )


def step(spec: ModelSpec, words: str, health: ModelHealth | None = None, **options: Any) -> RolloutStep:
    replicas = [replica(word, spec.revision) for word in words.split()]
    return next_step(spec, replicas, health or ModelHealth(), can_roll_back=options.get("back", False), now=NOW)


@pytest.mark.parametrize(
    ("wanted", "words", "create", "remove"),
    [
        (3, "", 3, ()),
        (3, "r1 b2", 1, ()),
        (2, "r1 r2", 0, ()),
        (2, "r1 f2", 1, ()),
        (2, "r1 d2", 1, ()),  # what drains does not count
        (1, "r1 r2", 0, ("m-2",)),  # the youngest goes
        (1, "b1 r2", 0, ("m-1",)),  # what does not serve goes first
        (1, "r1 r2 b3 v4", 0, ("m-4", "m-3", "m-2")),
        (0, "r1", 0, ("m-1",)),
    ],
)
def test_without_an_update_what_is_missing_is_made_and_what_is_too_much_goes(
    wanted: int, words: str, create: int, remove: tuple[str, ...]
) -> None:
    assert step(model(wanted), words) == RolloutStep(create=create, remove=remove)


@pytest.mark.parametrize(
    ("wanted", "surge", "words", "create", "remove", "yields"),
    [
        # One above the wanted number is made; as it serves, an old one goes, the eldest first.
        (2, 1, "R1 R2", 1, (), "m-1"),
        (2, 1, "R1 R2 b3", 0, (), ""),
        (2, 1, "R1 R2 r3", 1, ("m-1",), ""),
        (2, 1, "D1 R2 r3", 1, (), ""),
        (2, 1, "R2 r3 b4", 0, (), ""),
        (2, 1, "R2 r3 r4", 0, ("m-2",), ""),
        # Old ones that do not serve go first and at once, and make room.
        (2, 1, "B1 R2", 2, ("m-1",), ""),
        (2, 1, "V1 B2", 2, ("m-1", "m-2"), ""),
        # More room: more at once.
        (3, 2, "R1 R2 R3", 2, (), "m-1"),
        (3, 3, "R1 R2 R3 r4 b5", 1, ("m-1",), ""),
        (4, 64, "R1 R2 R3 R4", 4, (), "m-1"),
        # No surge: one old one goes, and only then a new one is made.
        (2, 0, "R1 R2", 0, ("m-1",), ""),
        (2, 0, "D1 R2", 1, (), ""),
        (2, 0, "R2", 1, (), "m-2"),
        (2, 0, "R2 b3", 0, (), ""),
        (2, 0, "R2 r3", 0, ("m-2",), ""),
        # Fewer are wanted than there were.
        (1, 1, "R1 R2 R3", 1, ("m-1", "m-2"), ""),
    ],
)
def test_an_update_exchanges_replicas_and_never_lets_fewer_serve_than_are_wanted(
    wanted: int, surge: int, words: str, create: int, remove: tuple[str, ...], yields: str
) -> None:
    found = step(model(wanted, surge), words)
    updated = sum(word[0] == "r" for word in words.split())
    expected = RolloutStep(create=create, remove=remove, progress=f"{updated} of {wanted} updated", yield_one=yields)
    assert found == expected


def test_new_replicas_beyond_the_wanted_number_go_before_any_old_one() -> None:
    assert step(model(1), "R1 r2 r3 b4") == RolloutStep(remove=("m-4", "m-3"))


@pytest.mark.parametrize(("until_s", "create"), [(NOW + 0.1, 0), (NOW, 2), (0.0, 2)])
@pytest.mark.parametrize("words", ["", "R7 R8"])
def test_after_a_failure_starts_wait_for_their_time(until_s: float, create: int, words: str) -> None:
    spec = model(2, surge=2)
    own = ModelHealth(failures=1, not_before_s=until_s, revision=spec.revision)
    assert step(spec, words, own).create == create
    others = ModelHealth(failures=1, not_before_s=until_s, revision="older")
    assert step(spec, words, others).create == 2, "the failures of another revision hold nothing up"


def test_without_a_surge_no_old_replica_goes_while_starts_wait() -> None:
    spec = model(2, surge=0)
    failed = ModelHealth(failures=1, not_before_s=NOW + 1, revision=spec.revision)
    assert step(spec, "R1 R2", failed).remove == ()


@pytest.mark.parametrize(
    ("failures", "revision", "back", "given_up"),
    [(1, "own", True, False), (2, "own", True, True), (3, "own", True, True), (2, "own", False, False),
     (2, "older", True, False)],
)  # fmt: skip
def test_an_update_is_given_up_after_its_attempts(failures: int, revision: str, back: bool, given_up: bool) -> None:
    spec = model(1, attempts=2)
    health = ModelHealth(failures, 0.0, spec.revision if revision == "own" else revision, "no such file")
    found = step(spec, "R1", health, back=back)
    assert found.roll_back == (f"{failures} starts failed in a row: no such file" if given_up else "")


@pytest.mark.parametrize(
    ("words", "back", "given_up"),
    [
        ("", True, True),  # the old one had to go first: there was no room beside it
        ("f2", True, True),
        ("", False, False),  # nothing is known to have worked
        ("r2", True, False),  # it works: that another one of it fails is no fault of the update
    ],
)
def test_an_update_without_room_falls_back_on_the_old_spec_though_nothing_of_it_runs(
    words: str, back: bool, given_up: bool
) -> None:
    spec = model(2, surge=0, attempts=2)
    health = ModelHealth(2, NOW + 1, spec.revision, "no such file")
    found = step(spec, words, health, back=back)
    assert bool(found.roll_back) == given_up


@pytest.mark.parametrize(("until_s", "create", "put_off"), [(NOW + 1, 1, 1), (NOW, 2, 0)])
def test_what_would_stand_beside_a_lease_that_still_runs_is_made_later(
    until_s: float, create: int, put_off: int
) -> None:
    spec = model(3)
    lost = replica("f1", spec.revision)
    lost = Replica(**{name: getattr(lost, name) for name in Replica.__slots__} | {"serves_until_s": until_s})
    found = next_step(spec, [lost, replica("r2", spec.revision)], ModelHealth(), can_roll_back=False, now=NOW)
    assert (found.create, found.put_off) == (create, put_off)
