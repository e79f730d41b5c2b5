"""A systemd unit per ssh host, for clusters that come back with their machines. Pure."""

from __future__ import annotations

from megatoken.cluster.launchers.artefact import Artefact
from megatoken.cluster.launchers.node.command import TOKEN_FILE, node_command, spec_on
from megatoken.cluster.launchers.spec import LaunchSpec, SshHost, SshLaunch
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import dump_spec

STATE = "/var/lib/megatoken"
UNIT = """\
# {host}: /etc/systemd/system/megatoken.service. Written by `megatoken render systemd`; render again instead of editing.
# The token is {state}/{token}, mode 600, owned by the user below, the same on every host.
[Unit]
Description=Megatoken node of the cluster {cluster} (Ray {role})
After=network-online.target
Wants=network-online.target

[Service]
User=megatoken
StateDirectory=megatoken
StateDirectoryMode=0700
{environment}
ExecStart={command}
KillMode=mixed
TimeoutStopSec=90
Restart=on-failure
RestartSec=5
LimitNOFILE=65536
LimitMEMLOCK=infinity
LimitCORE=0

[Install]
WantedBy=multi-user.target
"""


def systemd_artefacts(spec: ClusterSpec, launch: LaunchSpec) -> list[Artefact]:
    """HOST.service for every host of launch.ssh, and the spec that the head reads from /etc/megatoken."""
    ssh = launch.ssh
    if ssh is None:
        raise ValueError("launch.ssh is missing: it lists the hosts")
    units = [Artefact(f"{host.host}.service", _unit(spec, launch, ssh, host)) for host in ssh.hosts]
    address = f"{ssh.hosts[0].node_address}:{launch.ports.head}"
    return [*units, Artefact("spec.yaml", dump_spec(spec_on(spec, address)))]


def _unit(spec: ClusterSpec, launch: LaunchSpec, ssh: SshLaunch, host: SshHost) -> str:
    head = ssh.hosts[0]
    command = node_command(
        spec,
        launch.ports,
        host,
        ray=f"{ssh.prefix}/bin/ray",
        head_address=head.node_address,
        head=host is head,
        token_path=f"{STATE}/{TOKEN_FILE}",
    )
    node = [f"{ssh.prefix}/bin/python", "-m", "megatoken.cluster.launchers.node", "run"]
    node += ["--directory", STATE, "--address", host.node_address]
    interface = host.interface or spec.network.interface
    node += ["--interface", interface] if interface else []
    if host is head:
        node += ["--then", f"{ssh.prefix}/bin/megatoken up --detach --no-wait -f /etc/megatoken/spec.yaml"]
    return UNIT.format(
        host=host.host,
        state=STATE,
        token=TOKEN_FILE,
        cluster=spec.cluster,
        role="head" if host is head else "node",
        environment="\n".join(f"Environment={quoted(f'{name}={value}')}" for name, value in command.env.items()),
        command=" ".join(quoted(word) for word in [*node, "--", *command.ray]),
    )


def quoted(word: str) -> str:
    """A word as systemd.service(5) reads it: quotes where needed, % and $ doubled."""
    word = word.replace("%", "%%").replace("$", "$$")
    if word and not any(character in word for character in " \t\"'\\;"):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
