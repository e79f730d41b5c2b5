"""What is wrong with a spec that only this machine can tell: ports in use, a model's sizes, files that are missing.

Called by the command line before anything is started. Reads files and binds ports for a moment; changes nothing.
"""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from megatoken.cluster.decide.launches import LOOPBACK
from megatoken.cluster.inventory.model_memory import parallel_problems
from megatoken.cluster.inventory.model_shape import ModelShape, ShapeError, load_shape
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.model import ModelSpec
from megatoken.worker.models import BUILTIN, PREFIX, cache_directory

CONFIG_FILE = "config.json"


def model_problems(spec: ClusterSpec) -> list[str]:
    """Sources that do not exist and parallel sizes that a model does not allow; one line each."""
    problems = []
    runs_here = spec.ray.address == "local" and not spec.launch  # elsewhere the doctor looks, on every node
    for model in spec.models:
        problems += [f"models.{model.name}.{text}" for text in _source_problems(model, here=runs_here)]
        shape = shape_of(model)
        if shape is not None:
            sizes = model.parallel
            found = parallel_problems(
                shape, tensor=sizes.tensor, pipeline=sizes.pipeline, data=sizes.data, expert=sizes.expert
            )
            problems += [f"models.{model.name}.{text}" for text in found]
            problems += [f"models.{model.name}.{text}" for text in _length_problems(model, shape)]
    for field, path in _files(spec):
        if path is not None and not path.is_file():
            problems.append(f"{field}: {str(path)!r} is not allowed; a file that exists on every node")
    return problems


def shape_of(model: ModelSpec) -> ModelShape | None:
    """The model's sizes, when its config.json is on this machine and is one that is understood."""
    directory = source_directory(model.source)
    if directory is None or not (directory / CONFIG_FILE).is_file():
        return None
    try:
        return load_shape(directory, model.dtype)
    except (ShapeError, OSError):
        return None


def source_directory(source: str) -> Path | None:
    """The directory that a source means on this machine, whether or not it is there; None for a Hugging Face id."""
    if source.startswith(PREFIX):
        return cache_directory() / source.removeprefix(PREFIX)
    if source.startswith(("/", "./", "../", "~")):
        return Path(source).expanduser()
    return None


def port_problems(spec: ClusterSpec) -> list[str]:
    """Fixed ports of a local cluster that another process has; one line each."""
    hosts = {"control": spec.control.host, "routers": spec.routers.host, "edge": spec.edge.host}
    problems = []
    for field, port in spec.ports.items():
        host = hosts[field.partition(".")[0]] or LOOPBACK
        if port and _in_use(host, port):
            problems.append(f"{field}: {port} is not allowed; it is in use on {host} (0 takes any free port)")
    return problems


def device_problems(spec: ClusterSpec) -> list[str]:
    """A local cluster whose single replicas are wider than its slots; what does not fit yet is only blocked."""
    slots = spec.ray.cpu_devices
    if spec.ray.address != "local" or slots is None or spec.ray.gpus:
        return []
    return [
        f"models.{model.name}.parallel: {model.parallel.width} devices a replica is not allowed; "
        f"ray.cpu_devices gives this cluster {slots}"
        for model in spec.models
        if model.parallel.width > slots
    ]


def _source_problems(model: ModelSpec, *, here: bool) -> list[str]:
    if model.source.startswith(PREFIX) and model.source.removeprefix(PREFIX) not in BUILTIN:
        known = ", ".join(PREFIX + name for name in BUILTIN)
        return [f"source: {model.source!r} is not allowed; built-in models are {known}"]
    directory = source_directory(model.source)
    if here and directory is not None and not model.source.startswith(PREFIX) and not directory.is_dir():
        return [f"source: {model.source!r} is not allowed; a directory with a model, or a Hugging Face id"]
    return []


def _length_problems(model: ModelSpec, shape: ModelShape) -> list[str]:
    longest = shape.max_positions
    stretched = any("rope" in name or "hf_overrides" in name for name in model.engine_args)
    if model.max_model_len and longest and model.max_model_len > longest and not stretched:
        return [f"max_model_len: {model.max_model_len} is not allowed; at most the model's {longest}"]
    return []


def _files(spec: ClusterSpec) -> list[tuple[str, Path | None]]:
    tls = spec.security.tls
    found: list[tuple[str, Path | None]] = [("security.api_keys_file", spec.security.api_keys_file)]
    if tls is not None:
        found += [(f"security.tls.{name}", getattr(tls, name)) for name in ("cert_file", "key_file", "ca_file")]
    return found


def _in_use(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
