"""Puts the controller together inside its Ray actor: state file, server, attendance, metrics, the loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from megatoken.cluster.controller.loop import Controller, Settings, bind_host
from megatoken.cluster.controller.monitoring.metrics import ControllerMetrics
from megatoken.cluster.controller.monitoring.service_discovery import serve_controller_metrics
from megatoken.cluster.controller.ports import find_ports
from megatoken.cluster.controller.server import ControlServer
from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.decide.backend import Backend
from megatoken.cluster.runtime_dirs import state_path
from megatoken.cluster.secrets_keeper import SecretsKeeper
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.log import JsonFormatter
from megatoken.metrics import MetricsServer, new_registry
from megatoken.worker.throughput.attendance import AttendanceServicer

logger = logging.getLogger(__name__)
Bound = TypeVar("Bound")
LOG_LINES = 2000
SETTLED_PORTS = ("control.port", "routers.port", "edge.port", "agents.port", "control.metrics_port")
RESTART_BIND_S = 5.0  # a restarted controller may find its port still held by the one that died
PROBLEM_KEPT_S = 180.0  # whoever starts a new controller reads within this why it does not serve, and ends the actor
EXIT_PAUSE_S = 1.0  # before Ray starts it again, so that a lasting fault does not keep a core busy


class ControllerActor:
    """The Ray actor `controller`: one thread runs the event loop, and the actor does not outlive it.

    A controller that cannot serve, or fails later, ends its process, and Ray starts the actor again. A new one that
    cannot serve first says what is wrong, for whoever brings the cluster up.
    """

    def __init__(
        self, cluster: str, state_file: str, runtime_root: str, node_address: str, spec_json: str | None
    ) -> None:
        """`state_file`: empty where it lies at this machine's own place, which the caller cannot know."""
        self._ready = threading.Event()
        self._closed = threading.Event()
        self._address = ""
        self._problem = ""
        self._secrets: SecretsKeeper | None = None
        # Restarted by Ray, it carries on with what the state file says, or anew where that is lost; new, it takes what
        # it is given, also where an earlier cluster of that name was lost and left its file.
        self._restarted = was_restarted()
        state = Path(state_file) if state_file else state_path(os.environ, cluster)
        arguments = (state, Path(runtime_root), node_address, spec_json)
        threading.Thread(target=self._live, args=arguments, name="controller", daemon=True).start()

    def address(self, timeout_s: float) -> tuple[str, str]:
        """(host:port, problem), once one of them is known; the problem is empty when it serves."""
        self._ready.wait(timeout_s)
        return self._address, self._problem

    def operator_token(self) -> str:
        """For whoever may connect to Ray: `megatoken up`. Empty before it serves."""
        return self._secrets.operator_token if self._secrets is not None else ""

    def wait_closed(self, timeout_s: float) -> bool:
        """True once the cluster was taken down."""
        return self._closed.wait(timeout_s)

    def _live(self, state_file: Path, runtime_root: Path, node_address: str, spec_json: str | None) -> None:
        try:
            guest = asyncio.run(self._serve(state_file, runtime_root, node_address, spec_json))
        except BaseException as error:
            logger.exception("the controller failed")
            if not (self._ready.is_set() or self._restarted):
                self._problem = str(error) or type(error).__name__
                self._ready.set()
                time.sleep(PROBLEM_KEPT_S)
            time.sleep(EXIT_PAUSE_S)
            end_process()  # Ray starts it again, and it carries on from the state file
            return
        self._closed.set()
        if guest:
            end_own_actor()

    async def _serve(self, state_file: Path, runtime_root: Path, node_address: str, spec_json: str | None) -> bool:
        """Serves until the cluster was taken down; says whether Ray is not ours and stays."""
        lines = collect_logs(runtime_root, state_file)
        store = StateStore(state_file)
        if spec_json is not None and (not self._restarted or store.spec() is None):
            store.put_spec(ClusterSpec.model_validate_json(spec_json), {})
            store.put(stopping="")
        spec = store.spec()
        if spec is None:
            raise RuntimeError("no spec was given and the state file holds none")
        host = bind_host(spec, node_address)
        settle_ports(store, spec, host)
        local = spec.ray.address == "local"
        advertise = node_address if host in ("0.0.0.0", "::") else host
        settings = Settings(spec.cluster, state_file, local, host, advertise, spec.security.client_tls)
        secrets = SecretsKeeper(state_file.parent)
        controller = Controller(settings, store, secrets, lambda: ray_backend(spec.cluster, runtime_root))
        controller.log_lines = lines
        server = ControlServer(controller, spec.security.server_tls)
        attendance = AttendanceServicer(
            controller.publisher.set_throughput,
            last_epoch=int(store.get("throughput_epoch") or 0),
            on_fault=lambda: controller.on_fault("attendance"),
        )
        attendance.attach(server.server)
        async with contextlib.AsyncExitStack() as ends:
            ends.callback(store.close)
            ends.push_async_callback(server.stop)
            ports = store.ports()
            port = await bind_patiently(
                "control.port", ports["control.port"], host, lambda: server.start(host, ports["control.port"])
            )
            controller.address = f"{advertise}:{port}"
            scheme = "https" if spec.security.tls else "http"

            async def bind_metrics() -> MetricsServer:
                return start_metrics(controller, host, advertise, ports["control.metrics_port"], scheme)

            metrics = await bind_patiently("control.metrics_port", ports["control.metrics_port"], host, bind_metrics)
            ends.callback(metrics.close)
            await attendance.start()
            ends.push_async_callback(attendance.stop)
            self._address, self._secrets = controller.address, secrets
            self._ready.set()
            await controller.run()
        return not local


def was_restarted() -> bool:
    """Whether Ray started this actor again after its death."""
    import ray

    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def end_own_actor() -> None:
    """Ends this actor for good: in a Ray that stays, nobody else waits to do it."""
    import ray

    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def ray_backend(cluster: str, runtime_root: Path) -> Backend:
    """The backend that is Ray, imported where Ray is."""
    from megatoken.cluster.ray.backend import RayBackend

    return RayBackend(cluster, runtime_root)


def end_process() -> None:
    """Ends this process at once, whatever its threads do."""
    os._exit(1)


async def bind_patiently(name: str, port: int, host: str, bind: Callable[[], Awaitable[Bound]]) -> Bound:
    """What `bind` returns; it is tried again while the port is held, as it may be for a moment after a restart.

    Raises RuntimeError after RESTART_BIND_S.
    """
    deadline_s = time.monotonic() + RESTART_BIND_S
    while True:
        try:
            return await bind()
        except (RuntimeError, OSError) as error:  # gRPC raises the first, a socket the second
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{name}: {port} is not allowed; it is in use on {host}") from error
            await asyncio.sleep(0.2)


def start_metrics(controller: Controller, host: str, advertise: str, port: int, edge_scheme: str) -> MetricsServer:
    """/metrics and /sd of the controller. Raises OSError when the port is in use."""
    registry = new_registry("controller")
    metrics = ControllerMetrics(registry)
    server = serve_controller_metrics(registry, lambda: metrics.status, host, port, advertise, edge_scheme)

    def on_tick(seconds: float, ok: bool) -> None:
        metrics.record_tick(seconds, ok)
        metrics.publish(controller.status())

    controller.on_tick = on_tick
    controller.on_event = metrics.record_event
    controller.on_fault = metrics.record_fault
    controller.metrics_address = f"{advertise}:{server.port}"
    return server


def settle_ports(store: StateStore, spec: ClusterSpec, host: str) -> None:
    """Finds a free port for each service whose port the spec leaves open, once: a restart keeps it."""
    fixed: Mapping[str, int] = spec.ports
    before = store.ports()
    settled = dict(before)
    settled |= {name: fixed[name] for name in SETTLED_PORTS if fixed.get(name, 0)}
    missing = [name for name in SETTLED_PORTS if name not in settled]
    settled |= zip(missing, find_ports(len(missing), host, random.Random()), strict=True)
    if settled != before:  # a controller starts again on a full disk
        store.put_ports(settled)


def collect_logs(runtime_root: Path, state_file: Path) -> deque[str]:
    """Sends this process's log as JSON lines to memory, for `megatoken logs`, and to stderr, which Ray keeps."""
    lines: deque[str] = deque(maxlen=LOG_LINES)

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, stream = Keep(), logging.StreamHandler()
    for entry in (handler, stream):
        entry.setFormatter(JsonFormatter({"process": "controller"}))
    root = logging.getLogger()
    root.handlers[:] = [handler, stream]
    root.setLevel(logging.INFO)
    logging.getLogger("ray").setLevel(logging.WARNING)
    return lines
