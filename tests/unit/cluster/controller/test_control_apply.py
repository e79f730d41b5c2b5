"""Apply reads a spec beside the control loop, not in it, and applies specs in the order they came."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from megatoken.cluster.controller.server import ControlServicer
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.v1 import control_pb2


class DesiredState:
    def __init__(self) -> None:
        self.applied: list[int] = []

    def apply(self, spec: ClusterSpec, _fleet: Any, *, dry_run: bool) -> tuple[int, list[str]]:
        self.applied.append(len(spec.models))
        return len(self.applied), []


def request(models: int) -> control_pb2.ApplyRequest:
    lines = (f"- {{name: m{number}, source: x}}\n" for number in range(models))
    return control_pb2.ApplyRequest(spec_yaml="models:\n" + "".join(lines))


async def test_the_loop_goes_on_while_a_large_spec_is_read() -> None:
    desired_state, turns = DesiredState(), 0
    controller: Any = SimpleNamespace(desired_state=desired_state, fleet=None)
    context: Any = None

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    ticking = asyncio.create_task(others())
    servicer = ControlServicer(controller)
    await asyncio.gather(*(servicer.Apply(request(models), context) for models in (2000, 1, 3)))
    ticking.cancel()
    assert desired_state.applied == [2000, 1, 3]
    assert turns, "read in the loop it would stand still"
