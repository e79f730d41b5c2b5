"""Runs the doctor's probes on every node of a Ray cluster: one actor a node, gone afterwards. Decides nothing.

Who calls it: cluster/doctor/examine.py. Every wait has a limit; a node that does not answer in time is reported,
not waited for.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatoken.cluster.doctor.facts import Examination, LinkFacts, NodeFacts, PairFacts
from megatoken.cluster.doctor.probe import Listener, all_reduce_pair, node_facts, try_connections
from megatoken.worker.engines.all_reduce import best_backend, free_port

START_S = 60.0  # an actor on a node that was idle: a Python process and its imports
FACTS_S = 30.0
PAIR_S = 30.0
MAX_ROUNDS = 15  # every pair of up to 16 nodes; beyond, each node against 15 others
Report = Callable[[str], None]


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=4)
class Probe:
    """The doctor's hands on one node."""

    def __init__(self, node: str, address: str) -> None:
        self._node, self._address = node, address
        self._listener: Listener | None = None

    def now(self) -> float:
        return time.time()

    def facts(self, gpus: int, sources: Sequence[str], ports: Sequence[int]) -> NodeFacts:
        return node_facts(self._node, self._address, expected_gpus=gpus, sources=sources, ports=ports)

    def listen(self) -> tuple[str, int]:
        self._listener = Listener(self._address)
        return self._address, self._listener.port

    def connect(self, targets: Mapping[str, tuple[str, int]]) -> list[LinkFacts]:
        return try_connections(self._node, targets)

    def free_port(self) -> int:
        return free_port(self._address)

    def backend(self) -> str:
        return best_backend()

    def pair(self, names: tuple[str, str], rank: int, store: tuple[str, int], backend: str) -> PairFacts:
        return all_reduce_pair(names, rank, store, self._address, backend, PAIR_S - 5)


def examine_cluster(
    address: str, *, sources: Sequence[str], head_ports: Sequence[int], reductions: bool, report: Report
) -> Examination:
    """Connects to Ray and looks at every living node. Raises ConnectionError when Ray cannot be reached."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    probes: dict[str, Any] = {}
    try:
        alive = {str(node["NodeID"]): node for node in ray.nodes() if node["Alive"]}
        report(f"looking at {len(alive)} nodes")
        for node_id, node in alive.items():
            place = NodeAffinitySchedulingStrategy(node_id, soft=False)
            start: Any = Probe
            probes[node_id] = start.options(scheduling_strategy=place).remote(node_id, node["NodeManagerAddress"])
        nodes = _facts(alive, probes, sources, head_ports)
        reached = {node.node: probes[node.node] for node in nodes if not node.error}
        report("opening connections between all of them")
        links = _links(reached)
        pairs, note = _pairs(reached, report) if reductions and len(reached) > 1 else ([], "")
        return Examination(tuple(nodes), tuple(links), tuple(pairs), note)
    finally:
        for probe in probes.values():
            ray.kill(probe)
        ray.shutdown()


def _facts(
    alive: Mapping[str, Any], probes: Mapping[str, Any], sources: Sequence[str], head_ports: Sequence[int]
) -> list[NodeFacts]:
    """Facts with clock offsets; a node that does not answer carries the error instead."""
    asked = {}
    for node_id, node in alive.items():
        resources = node.get("Resources", {})
        ports = head_ports if "node:__internal_head__" in resources else ()
        asked[node_id] = probes[node_id].facts.remote(int(resources.get("GPU", 0)), list(sources), list(ports))
    deadline = time.monotonic() + START_S
    found = []
    for node_id, reference in asked.items():
        try:
            facts = ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
            offset, error = _clock(probes[node_id])
            found.append(replace(facts, clock_offset_s=offset, clock_error_s=error))
        except (RayError, TimeoutError) as problem:
            node = alive[node_id]
            why = str(problem).strip().splitlines()[0] if str(problem).strip() else "no answer in time"
            found.append(NodeFacts(node_id, node["NodeManagerAddress"], str(node.get("NodeName", "")), error=why[:200]))
    return found


def _clock(probe: Any) -> tuple[float, float]:
    """(the node's clock minus ours, half the round trip), of the quickest of a few questions."""
    best = (0.0, float("inf"))
    for _ in range(5):
        asked, started = time.time(), time.perf_counter()
        answer = ray.get(probe.now.remote(), timeout=FACTS_S)
        half = (time.perf_counter() - started) / 2
        if half < best[1]:
            best = (answer - (asked + half), half)
    return best


def _links(probes: Mapping[str, Any]) -> list[LinkFacts]:
    """Every node tries every other, so both directions of each pair are seen."""
    opened = dict(
        zip(probes, ray.get([probe.listen.remote() for probe in probes.values()], timeout=FACTS_S), strict=True)
    )
    asked = [
        probe.connect.remote({target: where for target, where in opened.items() if target != source})
        for source, probe in probes.items()
    ]
    return [link for links in ray.get(asked, timeout=START_S + len(probes)) for link in links]


def rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """A round-robin tournament: in each round every node meets another, and over n - 1 rounds all others. Pure."""
    seats: list[str | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        meets = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(one, other) for one, other in meets if one is not None and other is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def _pairs(probes: Mapping[str, Any], report: Report) -> tuple[list[PairFacts], str]:
    backends = dict(zip(probes, ray.get([p.backend.remote() for p in probes.values()], timeout=START_S), strict=True))
    planned = rounds(sorted(probes))
    note = ""
    if len(planned) > MAX_ROUNDS:
        note = f"all-reduce was measured between each node and {MAX_ROUNDS} of its {len(planned)} peers"
        planned = planned[:MAX_ROUNDS]
    found = []
    for number, meets in enumerate(planned, 1):
        report(f"all-reduce, round {number} of {len(planned)}")
        found += _round(probes, backends, meets)
    return found, note


def _round(probes: Mapping[str, Any], backends: Mapping[str, str], meets: Sequence[tuple[str, str]]) -> list[PairFacts]:
    """Disjoint pairs at once. A pair reports what its first node measured, or the error of either."""
    asked = []
    addresses = ray.get([probes[one].listen.remote() for one, _ in meets], timeout=FACTS_S)
    free = ray.get([probes[one].free_port.remote() for one, _ in meets], timeout=FACTS_S)
    for (one, other), (address, _), port in zip(meets, addresses, free, strict=True):
        backend = "nccl" if backends[one] == backends[other] == "nccl" else "gloo"
        names, store = (one, other), (address, port)
        sides = [probes[side].pair.remote(names, rank, store, backend) for rank, side in enumerate(names)]
        asked.append((names, backend, sides))
    found = []
    for names, backend, sides in asked:
        try:
            mine, theirs = ray.get(sides, timeout=PAIR_S + 10)
            found.append(theirs if theirs.error and not mine.error else mine)
        except (RayError, TimeoutError):
            found.append(PairFacts(*names, backend, error=f"no answer within {PAIR_S + 10:.0f} s"))
    return found
