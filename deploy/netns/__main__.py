"""Command line for hosts and Ray nodes on one machine: up, run, shell, list, down."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from deploy.netns import hosts
from deploy.netns.ray_nodes import RayNodes

DEFAULT_NAME = "mtlab"


def up(arguments: argparse.Namespace) -> int:
    network = hosts.Network.create(arguments.nodes, name=arguments.name, owned=False)
    try:
        nodes = RayNodes(network, arguments.devices)
        print(f"starting Ray at {', '.join(f'{host.address} ({host.name})' for host in network.hosts)}", flush=True)
        nodes.start()
    except BaseException:
        network.destroy()
        raise
    print(f"\n{len(network.hosts)} nodes, {arguments.devices} CPU device(s) each. Run a command on one of them:")
    print(f"  {sys.executable} -m deploy.netns run -- megatoken up -f deploy/netns/two-nodes.yaml")
    return 0


def run(arguments: argparse.Namespace) -> int:
    network = hosts.Network.load(arguments.name)
    host = network.host(arguments.host)
    command = [word for word in arguments.command if word != "--"] or [os.environ.get("SHELL", "/bin/sh")]
    environment = RayNodes(network, 1).environment(host)
    inside = ["--wd=" + str(Path.cwd())]
    line = host.command(command)
    split = line.index("--")
    return subprocess.run([*line[:split], *inside, *line[split:]], env=environment).returncode


def show(arguments: argparse.Namespace) -> int:
    for name in hosts.names():
        network = hosts.Network.load(name)
        for host in network.hosts:
            print(f"{name}\t{host.name}\t{host.address}\t{len(host.processes())} processes")
    return 0


def down(arguments: argparse.Namespace) -> int:
    hosts.Network.load(arguments.name).destroy()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.netns", description=__doc__)
    parser.add_argument("--name", default=DEFAULT_NAME, help="name of the network (default: %(default)s)")
    commands = parser.add_subparsers(dest="verb", required=True)
    verb = commands.add_parser("up", help="make hosts, and start a Ray node on each")
    verb.add_argument("--nodes", type=int, default=2)
    verb.add_argument("--devices", type=int, default=1, help="cpu_device slots of each node (default: %(default)s)")
    verb.set_defaults(do=up)
    verb = commands.add_parser("run", help="run a command on a host (a shell when none is given)")
    verb.add_argument("--host", default="node0")
    verb.add_argument("command", nargs=argparse.REMAINDER)
    verb.set_defaults(do=run)
    commands.add_parser("list", help="show the networks and hosts of this machine").set_defaults(do=show)
    commands.add_parser("down", help="end every process, and remove every namespace, interface and file").set_defaults(
        do=down
    )
    arguments = parser.parse_args()
    if reason := hosts.missing_requirement():
        print(f"deploy.netns: {reason}", file=sys.stderr)
        return 2
    try:
        return int(arguments.do(arguments))
    except hosts.NetworkError as error:
        print(f"deploy.netns: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
