"""Makes the weights of a spec's models the same on every node of a running Ray. Shell code; plan.py decides."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatoken.cluster.client.progress import Progress
from megatoken.cluster.fetch.plan import FetchError, Holding, further_files, plan
from megatoken.cluster.fetch.transfer import PIECES, FetchNode, Transfers
from megatoken.cluster.inventory.topology import Node
from megatoken.cluster.ray.inventory import inventory_of
from megatoken.cluster.view.human import bar, duration, gib

STORE_SHARE = 4  # pieces on their way may have this part of a node's object store
MOST_PIECE_BYTES, LEAST_PIECE_BYTES = 64 << 20, 1 << 20
POLL_S = 1.0
EXCLUDED_S = 30.0
NAMESPACE = "megatoken-fetch"


@dataclass(frozen=True, slots=True)
class Fetched:
    """One directory, as it is now."""

    directory: str
    files: int
    size: int
    """Bytes of all files."""
    copied: int
    """Bytes that were written."""
    nodes: int
    """That have all of it."""
    problems: Mapping[str, str]
    """By node title."""
    further: Mapping[str, Sequence[str]]
    """Files that a node has beyond those, by node title."""


def fetch(directories: Sequence[str], address: str, origin: str, progress: Progress) -> list[Fetched]:
    """`address`: of Ray. `origin`: name, address or id of the node whose files are right; "": they must not differ.

    Blocks as long as it takes. Raises FetchError, and what `ray.init` raises.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    try:
        listed = [node for node in ray.nodes() if node["Alive"]]
        nodes = inventory_of(listed).nodes
        known = [node.id for node in nodes if origin in (node.id, node.name, node.address)]
        if origin and not known:
            names = ", ".join(sorted(node.title for node in nodes))
            raise FetchError(f"--from: {origin!r} is not allowed; a node of the cluster: {names}")
        with _hands(nodes, progress) as hands:
            pieces = _piece_bytes(listed)
            right = known[0] if origin else ""
            return [_one(directory, nodes, hands, right, pieces, progress) for directory in directories]
    finally:
        progress.end_bar()
        ray.shutdown()


@contextlib.contextmanager
def _hands(nodes: Sequence[Node], progress: Progress) -> Iterator[Mapping[str, Any]]:
    """A FetchNode on each node, gone afterwards. Their names keep a second fetch out. Raises FetchError."""
    start: Any = FetchNode
    hands: dict[str, Any] = {}
    deadline = time.monotonic() + EXCLUDED_S
    try:
        for node in nodes:
            place = NodeAffinitySchedulingStrategy(node.id, soft=False)
            named = start.options(name=node.id, namespace=NAMESPACE, scheduling_strategy=place)
            while node.id not in hands:
                try:
                    hands[node.id] = named.remote()
                except ValueError:  # the name is taken; what a killed fetch left ends within seconds
                    if time.monotonic() > deadline:
                        raise FetchError("another `megatoken fetch` runs on this cluster; wait for its end") from None
                    progress.still("waiting for another fetch to end")
                    time.sleep(POLL_S)
        yield hands
    finally:
        for hand in hands.values():
            ray.kill(hand)


def _piece_bytes(listed: Sequence[Mapping[str, Any]]) -> int:
    store = min(int(node.get("Resources", {}).get("object_store_memory", 0)) for node in listed)
    return max(LEAST_PIECE_BYTES, min(MOST_PIECE_BYTES, store // STORE_SHARE // PIECES))


def _one(
    directory: str, nodes: Sequence[Node], hands: Mapping[str, Any], origin: str, piece_bytes: int, progress: Progress
) -> Fetched:
    titles = {node.id: node.title for node in nodes}
    holdings, problems = _holdings(directory, nodes, hands, progress)
    planned = plan(directory, holdings, origin)
    total, copied, began = sum(one.missing for one in planned.transfers), 0, time.monotonic()
    lacking = {node for one in planned.transfers for node in one.targets}
    if total:
        progress.say(f"{directory}: {gib(total)} to write, on {', '.join(sorted(titles[node] for node in lacking))}")

    def report(written: int) -> None:
        nonlocal copied
        copied += written
        took_s = time.monotonic() - began
        left = f", {duration((total - copied) * took_s / copied)} left" if copied else ""
        progress.bar(f"{bar(copied, total)} of {gib(total)}, {gib(int(copied / max(took_s, 1e-3)))}/s{left}")

    moving = Transfers(directory, hands, piece_bytes, report)
    for transfer in planned.transfers:
        moving.run(transfer)
    problems |= moving.problems
    return Fetched(
        directory,
        len(planned.files),
        sum(content.size for content in planned.files.values()),
        copied,
        sum(1 for one in holdings if one.receives and one.node not in problems),
        {titles[node]: text for node, text in problems.items()},
        further_files(holdings, origin) if origin else {},
    )


def _holdings(
    directory: str, nodes: Sequence[Node], hands: Mapping[str, Any], progress: Progress
) -> tuple[list[Holding], dict[str, str]]:
    """What each node has, and the nodes that do not say. Files that were never hashed before take their time."""
    any_devices = any(node.devices for node in nodes)
    asked = {hands[node.id].held.remote(directory): node for node in nodes}
    holdings, problems = [], {}
    began = time.monotonic()
    while asked:
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_S)
        for reference in ready:
            node = asked.pop(reference)
            try:
                files, parts, free = ray.get(reference)
                receives = bool(node.devices) or not any_devices
                holdings.append(Holding(node.id, node.title, receives, files, parts, free))
            except RayError as error:
                problems[node.id] = str(error).strip().splitlines()[-1]
        if asked:
            names = ", ".join(sorted(node.title for node in asked.values()))
            progress.bar(f"{directory}: hashing what is on {names}, for {duration(time.monotonic() - began)}")
    return sorted(holdings, key=lambda one: one.title), problems
