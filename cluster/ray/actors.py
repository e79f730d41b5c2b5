"""The Ray actors: thin hulls around a child process and around the controller. They decide nothing.

ProcessActor runs one worker, router, edge or agent on the node it was placed on; the child dies with it. Names in the
cluster's namespace are `replica/ID`, `process/NAME` and `controller`, by which a restarted controller finds them again.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import ray

from megatoken.cluster.decide.launches import DEVICES, NODE_ADDRESS
from megatoken.cluster.ray.child import Child, Launch
from megatoken.process.devices import visibility
from megatoken.process.interface import interface_of
from megatoken.process.tag import tagged_processes

CONTROLLER_NAME = "controller"
REPLICA_PREFIX = "replica/"
PROCESS_PREFIX = "process/"
WATCH_S = 20.0  # a watch is answered at least this often, so that a lost one is noticed


def namespace_of(cluster: str) -> str:
    """The Ray namespace of a cluster's actors."""
    return f"megatoken-{cluster}"


class ProcessActor:
    """Supervises one child process."""

    def __init__(self, launch: dict[str, Any]) -> None:
        self._child = Child(Launch(**{**launch, "env": node_environment(launch)}))

    def watch(self, seen: int) -> dict[str, Any]:
        """The child's state once it is newer than `seen`."""
        state = self._child.wait_change(seen, WATCH_S)
        return {
            "version": state.version,
            "phase": state.phase,
            "facts": state.facts,
            "start_phase": state.start_phase,
            "reason": state.reason,
            "cause": state.cause.value,
        }

    def tail(self, lines: int) -> str:
        return self._child.tail(lines)

    def give_credentials(self, text: str) -> None:
        """Ray's own authenticated connection is the way that secrets travel."""
        self._child.give_credentials(text)

    def stop(self, grace_s: float) -> None:
        """Ends the child; returns when it is gone."""
        self._child.stop(grace_s)


def node_environment(launch: dict[str, Any]) -> dict[str, str]:
    """The launch's environment with what only the node knows: its address' interface, and what its devices are called.

    Raises ValueError for a device that this node's Ray was not given.
    """
    env = dict(launch["env"])
    devices = env.pop(DEVICES, "")
    if devices:
        env |= visibility(os.environ, [int(device) for device in devices.split(",")])
    address = env.pop(NODE_ADDRESS, "")
    if address:
        env.setdefault("VLLM_HOST_IP", address)
        interface = interface_of(address)
        if interface:
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
                env.setdefault(name, os.environ.get(name) or interface)  # what `ray start` was given there stands
    return env


@ray.remote(num_cpus=0, max_retries=0)
def processes_of(replicas: list[str]) -> dict[str, list[tuple[str, int, str]]]:
    """(part, pid, state) of the processes that these replicas have on the node this runs on."""
    return {
        replica: [(process.part, process.pid, process.state) for process in tagged_processes(replica)]
        for replica in replicas
    }


@ray.remote(num_cpus=0, max_retries=0)
def remove_directory(path: str) -> None:
    """Removes a runtime directory of a node that a cluster leaves."""
    shutil.rmtree(Path(path), ignore_errors=True)
