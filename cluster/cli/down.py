"""`megatoken down [--drain SECONDS]`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess

from megatoken.cluster.cli.common import add_cluster_arguments, chosen
from megatoken.cluster.client.control import ControlClient, Unreachable, client_of
from megatoken.cluster.client.progress import Progress, wait_until_down
from megatoken.cluster.client.records import ClusterRecord, alive, forget
from megatoken.cluster.runtime_dirs import state_directory
from megatoken.cluster.start.kept import kept_spec
from megatoken.cluster.start.over_kubernetes import down_over_kubernetes
from megatoken.cluster.start.over_slurm import down_over_slurm
from megatoken.cluster.start.over_ssh import down_over_ssh

CLEAR_S = 60.0  # past the drain, for processes to end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument("--drain", type=float, default=30.0, metavar="SECONDS", help="what running requests get")


def run(arguments: argparse.Namespace) -> int:
    record = chosen(arguments)
    launched = kept_spec(record.cluster)
    if launched is not None:
        if record.kubernetes:
            down_over_kubernetes(launched)
        elif record.slurm_job:
            down_over_slurm(launched, record, drain_s=arguments.drain)
        else:
            down_over_ssh(launched)
        return 0
    progress = Progress()
    with client_of(record) as client:
        take_down(client, record, progress, drain_s=arguments.drain)
    progress.say(f"cluster {record.cluster} is down")
    return 0


def take_down(
    client: ControlClient,
    record: ClusterRecord,
    progress: Progress,
    *,
    drain_s: float,
    guard: subprocess.Popen[bytes] | None = None,
) -> None:
    """Drains and ends the cluster, and waits until nothing is left. A local one that does not answer is ended."""
    try:
        client.shut_down(drain_s)
    except Unreachable:
        if not record.guard_pid:
            forget(state_directory(os.environ), record.cluster)
            raise
        if alive(record.guard_pid):
            progress.say("the controller does not answer; ending the cluster")
            os.kill(record.guard_pid, signal.SIGTERM)

    def gone() -> bool:
        if guard is not None:
            return guard.poll() is not None
        return not alive(record.guard_pid) if record.guard_pid else _silent(client)

    wait_until_down(client, timeout_s=drain_s + CLEAR_S, progress=progress, gone=gone)
    forget(state_directory(os.environ), record.cluster)


def _silent(client: ControlClient) -> bool:
    try:
        client.status()
    except Unreachable:
        return True
    return False
