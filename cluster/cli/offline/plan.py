"""`megatoken plan`: where a spec's replicas would stand, without touching anything."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from megatoken.cluster.cli.common import add_cluster_arguments, connect, read_text
from megatoken.cluster.inventory.model_shape import GIB, ModelShape, ShapeError, load_shape
from megatoken.cluster.inventory.topology import CPU_KIND, Device, Inventory, Node
from megatoken.cluster.launchers.load import launch_of
from megatoken.cluster.launchers.spec import SshHost
from megatoken.cluster.planning.plan import plan_cluster
from megatoken.cluster.planning.print import plan_json, plan_text
from megatoken.cluster.planning.topology_file import load_inventory
from megatoken.cluster.ray.live import live_inventory
from megatoken.cluster.spec.cluster import ClusterSpec, default_spec
from megatoken.cluster.spec.load import SpecError, load_spec
from megatoken.worker.models import PREFIX, cache_directory

EXIT_BLOCKED = 3  # the spec is right, but not all of it finds a place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", help="the spec, YAML; none: the embedded default")
    parser.add_argument("--inventory", type=Path, help="nodes as JSON or YAML; none: the spec's machines, or this one")
    parser.add_argument(
        "--live", action="store_true", help="plan on the nodes of the running cluster, as if it were empty"
    )
    add_cluster_arguments(parser)
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """0: everything finds a place; 3: something is blocked. Raises CommandError or SpecError for wrong input."""
    spec = load_spec(read_text(arguments.file)) if arguments.file else default_spec()
    if arguments.live:
        with connect(arguments) as client:
            inventory, note = live_inventory(client.status().nodes), ""
    else:
        inventory, note = planned_inventory(arguments.inventory, spec)
    shapes, unknown = read_shapes(spec)
    plan = plan_cluster(spec, inventory, shapes)
    if arguments.json:
        print(json.dumps(plan_json(plan), indent=1))
    else:
        for line in (note, *unknown):
            if line:
                print(line, file=sys.stderr)
        print(plan_text(plan))
    return 0 if plan.complete else EXIT_BLOCKED


def read_shapes(spec: ClusterSpec) -> tuple[dict[str, ModelShape], list[str]]:
    """Shapes by model name, for those whose config.json is at hand, and a line for each of the others."""
    shapes: dict[str, ModelShape] = {}
    unknown = []
    for model in spec.models:
        if model.engine != "vllm":
            continue
        directory = model_directory(model.source)
        if directory is None:
            unknown.append(f"{model.name}: no config.json of {model.source} at hand, so memory and heads are unchecked")
            continue
        try:
            shapes[model.name] = load_shape(directory, model.dtype)
        except ShapeError as error:
            raise SpecError([f"models.{model.name}.source: {error}"]) from None
    return shapes, unknown


def model_directory(source: str) -> Path | None:
    """Where the model's config.json lies, if it does: a directory, a converted built-in, a downloaded repository."""
    if source.startswith(PREFIX):
        places = [cache_directory() / source.removeprefix(PREFIX)]
    else:
        hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
        snapshots = hub / f"models--{source.replace('/', '--')}" / "snapshots"
        places = [Path(source).expanduser(), *sorted(snapshots.glob("*"))]
    return next((path for path in places if (path / "config.json").is_file()), None)


def planned_inventory(path: Path | None, spec: ClusterSpec) -> tuple[Inventory, str]:
    """The nodes to plan on, and a line that says where they come from when it was not a file."""
    if path is not None:
        return load_inventory(path), ""
    launch = launch_of(spec.launch)
    if launch.ssh is not None:
        hosts = [_host_node(host, head=number == 0) for number, host in enumerate(launch.ssh.hosts)]
        return Inventory(tuple(hosts)), f"no --inventory: planning on the {len(hosts)} hosts of launch.ssh"
    slots = spec.ray.cpu_devices if spec.ray.cpu_devices is not None else spec.width
    local = Node("local", "127.0.0.1", tuple(Device(CPU_KIND, index) for index in range(slots)), head=True)
    return Inventory((local,)), f"no --inventory: planning on this machine, with {slots} CPU slots"


def _host_node(host: SshHost, *, head: bool) -> Node:
    count = host.gpus or host.cpu_devices
    domains = [str(number) for number, size in enumerate(host.link_domains) for _ in range(size)]
    kind = host.device_kind or ("gpu" if host.gpus else CPU_KIND)
    memory = int(host.device_memory_gib * GIB)
    devices = tuple(
        Device(kind, index, memory, domains[index] if len(domains) == count else "") for index in range(count)
    )
    return Node(
        id=host.node_address,
        address=host.node_address,
        devices=devices,
        name=host.host,
        site=host.site,
        rack=host.rack,
        labels=host.node_labels,
        head=head,
    )
