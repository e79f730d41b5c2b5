"""What runs on a device's own node as Ray tasks: its check before it returns, and the look at what its driver says."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatoken.cluster.decide.device_check import DeviceCheck, Peer
from megatoken.cluster.inventory.topology import CPU_KIND
from megatoken.process.devices import visibility, visible_devices
from megatoken.worker.drivers import drivers
from megatoken.worker.engines.all_reduce import free_port

LOAD_S = 120.0  # an import of torch, and the load itself
REDUCE_S = 30.0  # for the other side to come and for the rounds
IMPORTS_S = 30.0  # of torch, on a node that does something else


@ray.remote(num_cpus=0, max_retries=0)
def check_device(check: DeviceCheck) -> str:
    """What is wrong with a device of the node this runs on; empty: nothing. A CPU slot is any of them."""
    try:
        seen = {} if check.kind == CPU_KIND else visibility(os.environ, [check.place[1]])
    except ValueError as error:
        return str(error)
    if problem := _run("device_check", [check.kind], seen, LOAD_S):
        return problem
    if check.kind != CPU_KIND and (broken := _given_up(check.place[1])):
        return f"its driver: {broken}"
    problems = []
    for peer in check.peers:
        if not (problem := _reduce_with(peer, check, seen)):
            return ""
        problems.append(f"no all-reduce with {peer.title}: {problem}")
    return "; ".join(problems)


def _reduce_with(peer: Peer, check: DeviceCheck, seen: Mapping[str, str]) -> str:
    """What is wrong between this device's node and a peer, by the side that ended first: the other waited for it."""
    store = (check.address, free_port(check.address))
    backend = "gloo" if peer.device is None else "nccl"
    strategy = NodeAffinitySchedulingStrategy(peer.node, soft=False)
    theirs = join_all_reduce.options(scheduling_strategy=strategy).remote(store, peer, backend)
    mine = _run("all_reduce", _side(0, store, check.address, backend), seen, REDUCE_S + IMPORTS_S)
    if not mine:
        return ""
    ended, _ = ray.wait([theirs], timeout=0)
    if not ended:
        ray.cancel(theirs, force=True)
        return mine
    try:
        return str(ray.get(theirs)) or mine
    except RayError as error:
        return str(error).splitlines()[0]


@ray.remote(num_cpus=0, max_retries=0)
def join_all_reduce(store: tuple[str, int], peer: Peer, backend: str) -> str:
    """The peer's side, on its node."""
    try:
        seen = visibility(os.environ, [peer.device]) if peer.device is not None else {}
    except ValueError as error:
        return str(error)
    return _run("all_reduce", _side(1, store, peer.address, backend), seen, REDUCE_S + IMPORTS_S)


def _side(rank: int, store: tuple[str, int], address: str, backend: str) -> list[str]:
    return [str(rank), store[0], str(store[1]), address, backend, str(REDUCE_S)]


def _run(program: str, arguments: Sequence[str], seen: Mapping[str, str], timeout_s: float) -> str:
    """What a program of ours found wrong. A process of its own: it leaves the device with nothing in use."""
    command = [sys.executable, "-m", f"megatoken.worker.engines.{program}", *arguments]
    try:
        done = subprocess.run(
            command, env={**os.environ, **seen}, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s"
    except OSError as error:
        return str(error)
    return (done.stdout.strip() or f"the check ended with status {done.returncode}") if done.returncode else ""


def _given_up(device: int) -> str:
    (name,) = visible_devices(os.environ, [device])
    for driver in drivers():
        with contextlib.suppress(Exception):  # it does not tell: whatever the library raises
            return driver.broken(name)
    return ""


@ray.remote(num_cpus=0, max_retries=0)
def driver_states(devices: list[int]) -> dict[int, tuple[int, str]]:
    """(uncorrected memory errors, why it is given up) by device of this node, of those that a driver knows."""
    found: dict[int, tuple[int, str]] = {}
    for driver in drivers():
        for device, name in zip(devices, visible_devices(os.environ, devices), strict=True):
            with contextlib.suppress(Exception):  # a device of the other vendor: whatever the library raises
                broken, errors = driver.broken(name), 0
                with contextlib.suppress(Exception):  # one without ECC, or that is lost
                    errors = driver.uncorrected_errors(name)
                found[device] = errors, broken
    return found
