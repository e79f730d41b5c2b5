"""`megatoken up` and `down` where the spec lists ssh hosts: Ray on all of them, and the controller on the first.

cluster/cli/up.py and cluster/cli/down.py hand over to it.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatoken.cluster.client.control import CommandError, Unreachable, client_of
from megatoken.cluster.client.progress import Progress, wait_until_settled
from megatoken.cluster.client.records import ClusterRecord, record_path, write_record, write_token
from megatoken.cluster.doctor.examine import findings_of
from megatoken.cluster.doctor.ssh_hosts import examine_hosts
from megatoken.cluster.launchers.load import launch_of
from megatoken.cluster.launchers.ssh.run import LaunchError, SshCluster, read_or_make_token
from megatoken.cluster.runtime_dirs import state_directory
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.start.examined import refuse
from megatoken.cluster.start.kept import forget_launch, keep
from megatoken.cluster.view.text import status_text


def wants_ssh(spec: ClusterSpec) -> bool:
    """Whether the spec is to be launched over ssh: it lists hosts, and names no Ray that runs already."""
    return spec.ray.address == "local" and launch_of(spec.launch).ssh is not None


def up_over_ssh(spec: ClusterSpec, *, wait: bool, timeout_s: float, doctor: bool) -> int:
    """Launches, waits until replicas are READY unless told not to. Raises CommandError, with everything taken down.

    `doctor`: every host is examined first, and nothing is started where something would stop the launch.
    """
    launch, states, progress = launch_of(spec.launch), state_directory(os.environ), Progress()
    if launch.ssh is None:
        raise CommandError("launch.ssh is missing: it lists the hosts", 2)
    if not spec.control.port:
        raise CommandError("control.port: 0 is not allowed with launch.ssh; a fixed port that this machine reaches", 2)
    if record_path(states, spec.cluster).exists():
        raise CommandError(
            f"cluster: {spec.cluster!r} is not allowed; it is up already, or `megatoken down` it first", 2
        )
    try:
        cluster = _cluster(spec, states, progress, doctor=doctor)
        if doctor:
            refuse(findings_of(spec, examine_hosts(spec, cluster)), progress)
        else:
            cluster.check()
        ray_address, token = cluster.up(), cluster.operator_token()
    except LaunchError as error:
        raise CommandError(str(error)) from None
    control = f"{launch.ssh.hosts[0].node_address}:{spec.control.port}"
    tls = spec.security.client_tls
    record = ClusterRecord(
        cluster=spec.cluster,
        control=control,
        ray_address=ray_address,
        tls=tls,
        token_file=str(write_token(states, spec.cluster, token)),
    )
    write_record(states, record)
    keep(states, spec)
    try:
        with client_of(record) as client:
            if wait:
                wait_until_settled(client, timeout_s=timeout_s, progress=progress)
                print(status_text(client.status()), flush=True)
    except BaseException as error:
        progress.say("taking down what was started")
        cluster.down(quiet=True)
        _forget(states, spec.cluster)
        if isinstance(error, Unreachable):
            raise CommandError(f"the controller on {control} cannot be reached from here; check the firewall") from None
        raise
    progress.say(f"cluster {spec.cluster} is up on {len(launch.ssh.hosts)} hosts; `megatoken down` takes it down")
    return 0


def fetch_over_ssh(spec: ClusterSpec, origin: str) -> int:
    """`megatoken fetch` on the hosts; starts Ray there for that unless the cluster is up. Raises CommandError."""
    states, progress = state_directory(os.environ), Progress()
    try:
        cluster = _cluster(spec, states, progress)
        if record_path(states, spec.cluster).exists():
            return cluster.fetch(origin)
        cluster.check()
        cluster.up(controller=False)
        try:
            return cluster.fetch(origin)
        finally:
            cluster.down(controller=False)
            (states / f"{spec.cluster}.token").unlink(missing_ok=True)
    except LaunchError as error:
        raise CommandError(str(error)) from None


def down_over_ssh(spec: ClusterSpec) -> None:
    """Takes the controller and Ray down on every host. Raises CommandError naming hosts that did not answer."""
    states, progress = state_directory(os.environ), Progress()
    try:
        _cluster(spec, states, progress).down()
    except LaunchError as error:
        raise CommandError(f"{error}; run `megatoken down` again once these hosts answer") from None
    _forget(states, spec.cluster)
    progress.say(f"cluster {spec.cluster} is down")


def _cluster(spec: ClusterSpec, states: Path, progress: Progress, *, doctor: bool = True) -> SshCluster:
    token = read_or_make_token(states / f"{spec.cluster}.token")
    return SshCluster(spec, launch_of(spec.launch), token, progress.say, doctor=doctor)


def _forget(states: Path, cluster: str) -> None:
    forget_launch(states, cluster)
    (states / f"{cluster}.token").unlink(missing_ok=True)
