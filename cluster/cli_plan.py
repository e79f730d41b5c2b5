"""`megatoken plan`: where a spec's replicas would stand, without touching anything."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from cluster.model_shape import ModelShape, ShapeError, load_shape
from cluster.plan import plan_cluster
from cluster.plan_print import plan_json, plan_text
from cluster.spec import ClusterSpec, default_spec
from cluster.spec_load import SpecError, load_spec
from cluster.topology import CPU_KIND, Device, Inventory, Node
from cluster.topology_file import load_inventory
from worker.models import PREFIX, cache_directory

EXIT_BLOCKED = 3  # the spec is right, but not all of it finds a place
EXIT_WRONG = 2


def add_plan_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the command; main() then calls args.run(args)."""
    parser = commands.add_parser("plan", help="show where replicas would stand, without touching anything")
    parser.add_argument("-f", "--file", type=Path, help="the spec; without it, the embedded default")
    parser.add_argument("--inventory", type=Path, help="nodes as JSON or YAML; without it, the spec's launch section")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=plan_command)


def plan_command(args: argparse.Namespace) -> int:
    """0: everything finds a place; 3: something is blocked; 2: the spec or the inventory is wrong."""
    try:
        spec = load_spec(args.file.read_text()) if args.file else default_spec()
        inventory, note = _inventory(args.inventory, spec)
        shapes, unknown = read_shapes(spec)
    except OSError as error:
        print(f"{args.file}: cannot be read: {error.strerror}", file=sys.stderr)
        return EXIT_WRONG
    except SpecError as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG
    plan = plan_cluster(spec, inventory, shapes)
    if args.json:
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


def _inventory(path: Path | None, spec: ClusterSpec) -> tuple[Inventory, str]:
    if path is not None:
        return load_inventory(path), ""
    slots = spec.ray.cpu_devices if spec.ray.cpu_devices is not None else spec.width
    local = Node("local", "127.0.0.1", tuple(Device(CPU_KIND, index) for index in range(slots)), head=True)
    return Inventory((local,)), f"no --inventory: planning on this machine, with {slots} CPU slots"
