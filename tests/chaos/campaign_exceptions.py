"""An exception at the n-th call inside each part of the router's core, for every n up to a bound, and in publishing.

Each run has its own fault: one Python call of the router's own code, made within the named function, raises instead.
Whatever that is, no stream has a gap, nothing stays counted, and only what the fault arose in may end with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

from megatoken.cluster.controller import publisher
from megatoken.cluster.controller.membership import Versions
from megatoken.cluster.controller.state import StateStore
from megatoken.errors import MegatokenError
from megatoken.router.core import ending, placement, upkeep
from megatoken.router.core.sink import SessionSink
from megatoken.router.intake import first_token, intake
from tests.chaos.outcome import Outcome
from tests.chaos.router_world import TURN_S, World
from tests.unit.cluster.controller.test_controller_loop import Running

NAME = "exceptions"
ABOUT = "an exception at the n-th call inside the router's core and the controller's publishing"

TARGETS: Final[dict[str, Callable[..., Any]]] = {
    "on_frames": intake.on_frames,
    "place_waiting": placement.place_waiting,
    "tick": upkeep.tick,
    "settle": ending.settle,
    "placement": placement.place,
    "first_token": first_token.first_token,
}
OWN: Final = ("router.", "megatoken.")
ARMED_AT: Final = (2, 9, 14)  # turns from which calls are counted: at the start, among losses, near the end
BOUND: Final = 120  # calls
TURNS: Final = 20
LAST_TURN: Final = 600
PUBLISHES: Final = 6


class Injected(Exception):
    """The fault."""


class Fuse:
    """Raises at the n-th call, from 1, of the router's code inside the function, once `armed`."""

    def __init__(self, function: Callable[..., Any], nth: int) -> None:
        self.function, self.left = function, nth
        self.armed = self.inside = False
        self.blown = ""  # where

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self.armed or self.blown or self.inside:
            return self.function(*arguments, **named)
        before = sys.gettrace()
        self.inside = True
        sys.settrace(self._call)
        try:
            return self.function(*arguments, **named)
        finally:
            sys.settrace(before)
            self.inside = False

    def _call(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # The function itself is its caller's call; what the world itself does is none of the router's.
        # A generator expression is called once more when it is dropped, where nothing can be raised.
        if code in (self.function.__code__, SessionSink.wake.__code__) or code.co_name == "<genexpr>":
            return
        if not str(frame.f_globals.get("__name__", "")).startswith(OWN):
            return
        self.left -= 1
        if self.left == 0:
            self.blown = f"{frame.f_globals['__name__']}.{code.co_name}"
            raise Injected(self.blown)

    @contextlib.contextmanager
    def laid(self) -> Iterator[None]:
        """In place of the function, wherever it was imported."""
        places = [
            (module, name)
            for module in list(sys.modules.values())
            if getattr(module, "__name__", "").startswith(("router.", "tests."))
            for name, value in list(vars(module).items())
            if value is self.function
        ]
        for module, name in places:
            setattr(module, name, self)
        try:
            yield
        finally:
            for module, name in places:
                setattr(module, name, self.function)


def one_run(target: str, armed_at: int, nth: int, seed: int, outcome: Outcome) -> str:
    """One fault; where it struck, empty when fewer calls were made."""
    fuse = Fuse(TARGETS[target], nth)
    with fuse.laid():
        world = World(seed)
        what = f"seed {seed}, call {nth} inside {target} from turn {armed_at}"
        for turn in range(LAST_TURN):
            fuse.armed = turn >= armed_at
            _one_turn(world, turn, fuse, outcome, what)
            if turn > TURNS and not world.fleet.state.live:
                break
        left = world.left()
    if not fuse.blown:
        return ""
    what += f" ({fuse.blown})"
    outcome.inputs += 1
    outcome.requests += len(world.asked)
    world.judge(outcome, what)
    for text in left:
        outcome.leaked += 1
        outcome.problem(f"{what}: left: {text}")
    failed = world.failed()
    # Concerned is one request, or those of one client whose tokens came together and could not be passed on.
    if len(failed) > 1 and len({asked.sink.index for asked in failed}) > 1:
        outcome.lost += len(failed)
        outcome.problem(f"{what}: {len(failed)} requests of several clients ended with it")
    return fuse.blown


def _one_turn(world: World, turn: int, fuse: Fuse, outcome: Outcome, what: str) -> None:
    """Every call of the core as its shell makes it: what a shell would not survive is wrong."""
    fleet, rng = world.fleet, world.rng

    def shell(call: Callable[[], Any], survives: type[Exception] | tuple[type[Exception], ...] = ()) -> None:
        try:
            call()
        except survives:
            pass
        except Injected:
            outcome.wrong += 1
            outcome.problem(f"{what} ({fuse.blown}): it came out of the core, in turn {turn}")

    if turn < TURNS - 4:
        delivery = rng.choice([0, 0, 1, 2])
        extra = {"seed": 7, "temperature": 1.0} if rng.random() < 0.2 else {}
        count, timeout_s = rng.randrange(1, 40), 1e3 if rng.random() < 0.5 else float("inf")
        shell(lambda: world.ask(count, timeout_s, delivery=delivery, max_delay_ms=50, **extra), MegatokenError)
    shell(world.turn)
    if turn in (8, 12) and world.fleet.replicas[turn % 4].connected:
        shell(lambda: fleet.lose(fleet.replicas[turn % 4]))
    if turn in (6, 13) and world.asked:
        asked = rng.choice(world.asked)
        asked.cancelled = True
        shell(lambda: fleet.cancel(asked.request))
    shell(lambda: fleet.tick(TURN_S), Injected)  # the loop that calls it goes on, see megatoken.process.supervise


async def publishing(outcome: Outcome, nth: int) -> None:
    """The controller's loop, with a fault at the n-th call of each thing that publishing needs."""
    for owner, name in ((publisher, "content_of"), (Versions, "offer"), (StateStore, "put")):
        real, left = getattr(owner, name), [nth]

        def failing(*arguments: Any, real: Any = real, left: list[int] = left, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Injected
            return real(*arguments, **named)

        with tempfile.TemporaryDirectory(prefix="mt-publish-") as folder:
            running = Running(Path(folder))
            running.start()
            setattr(owner, name, failing)
            what = f"call {nth} of {name}"
            try:
                await _published(running, what, outcome)
            finally:
                setattr(owner, name, real)
                await running.stop()
        outcome.inputs += left[0] <= 0


async def _published(running: Running, what: str, outcome: Outcome) -> None:
    """Two replicas are told; then one dies, and its successor is told to who waits for changes."""
    published = running.controller.publisher
    told: list[int] = []

    async def watch() -> None:
        seen = (0, 0)
        while True:
            snapshot = await published.newer_than(seen)
            seen = (snapshot.epoch, snapshot.version)
            told.append(snapshot.version)

    watcher = asyncio.create_task(watch())
    try:
        await running.until(lambda: len(running.serving()) == 2)
        before = set(running.serving())
        running.backend.replicas.pop("m-1")
        await running.until(lambda: len(running.serving()) == 2 and set(running.serving()) != before)
        await running.until(lambda: bool(told) and told[-1] == published.versions.current.version)
    except (TimeoutError, AssertionError) as error:
        outcome.lost += 1
        outcome.problem(f"{what}: {type(error).__name__}, told {told[-1:]}, now {published.versions.current.version}")
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def run(scale: float) -> Outcome:
    """Every call up to the bound in full, at three times of a run; in short every so many."""
    outcome = Outcome(simulated=True)
    seed = int(os.environ.get("MEGATOKEN_SEED", "1"))
    every = max(1, round(1 / scale))
    for target in TARGETS:
        for armed_at in ARMED_AT:
            for nth in range(1, BOUND + 1, every):
                if not one_run(target, armed_at, nth, seed, outcome):
                    break
                await asyncio.sleep(0)
    for nth in range(1, PUBLISHES + 1, every):
        await publishing(outcome, nth)
    return outcome
