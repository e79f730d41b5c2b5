"""Examines the hosts of an ssh launch, before anything is started on them: each tells its own facts."""

from __future__ import annotations

from megatoken.cluster.doctor.examine import head_ports, model_directories
from megatoken.cluster.doctor.facts import Examination
from megatoken.cluster.doctor.host import facts_of
from megatoken.cluster.launchers.load import launch_of
from megatoken.cluster.launchers.spec import SshHost, SshLaunch
from megatoken.cluster.launchers.ssh.run import LaunchError, SshCluster
from megatoken.cluster.launchers.ssh.steps import SshStep, python_on, ssh_argv
from megatoken.cluster.spec.cluster import ClusterSpec


def examine_hosts(spec: ClusterSpec, cluster: SshCluster) -> Examination:
    """Facts of every host, in the spec's order. Raises LaunchError for those that cannot be asked."""
    answers = cluster.ask(examination_steps(spec))
    try:
        return Examination(tuple(facts_of(each.printed, each.asked_s, each.answered_s) for each in answers))
    except (ValueError, TypeError, KeyError) as error:
        raise LaunchError(f"a host runs another release of Megatoken: its facts cannot be read ({error})") from None


def examination_steps(spec: ClusterSpec) -> tuple[SshStep, ...]:
    """One a host: megatoken.cluster.doctor.host with what the spec wants there. Pure."""
    launch = launch_of(spec.launch)
    if launch.ssh is None:
        raise ValueError("launch.ssh is missing: it lists the hosts")
    head = launch.ssh.hosts[0]
    ports = (*head_ports(spec), launch.ports.head)
    return tuple(_step(spec, launch.ssh, host, ports if host is head else ()) for host in launch.ssh.hosts)


def _step(spec: ClusterSpec, ssh: SshLaunch, host: SshHost, ports: tuple[int, ...]) -> SshStep:
    words = ["-m", "megatoken.cluster.doctor.host", "--address", host.node_address]
    interface = host.interface or spec.network.interface
    words += ["--interface", interface] if interface else []
    words += ["--gpus", str(host.gpus)] if host.gpus is not None else []
    for option, values in (("--source", model_directories(spec)), ("--port", ports)):
        words += [word for value in values for word in (option, str(value))]
    return SshStep(host.host, "examine it", ssh_argv(ssh, host, python_on(ssh, *words)))
