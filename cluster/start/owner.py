"""The process that brings a cluster's controller up: the owner of a local Ray, or a guest of an existing one.

    python -m megatoken.cluster.start.owner --config FILE --ready-fd N

Local: starts a Ray head with token authentication, creates the controller actor, and lives as long as the cluster;
cluster/start/guard.py is its parent and clears up behind it. Otherwise: connects, creates the controller on the head
node and ends; the controller stays.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from megatoken.cluster.decide.launches import LOOPBACK
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.process.program import read_arguments, report_ready
from megatoken.process.tree import descendants, die_with_parent, send

START_TIMEOUT_S = 120.0
WATCH_S = 5.0
RAY_ATTEMPTS = 3
RAY_GAVE_UP = "timed out during startup"  # ray._private.node, where the 30 s are a constant

logger = logging.getLogger(__name__)


class BringUp(BaseModel):
    """What to bring up, and where its files go."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: ClusterSpec
    runtime_root: Path
    state_file: Path | None = Field(None, description="the controller's; none: where the head's own environment says")
    ray_temp_dir: Path | None = Field(None, description="local Ray: its session directory; short, for socket paths")


class BringUpError(RuntimeError):
    """The controller did not come up; the text says why."""


def main() -> int:
    config, ready_fd = read_arguments("megatoken.cluster.start.owner", BringUp)
    local = config.spec.ray.address == "local"
    if local:  # the guard's end must not be abrupt: Ray is shut down in order
        die_with_parent(number=signal.SIGTERM)
    stop: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        stop.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    try:
        return _own(config, ready_fd, stop) if local else _join(config, ready_fd)
    except (KeyboardInterrupt, SystemExit):
        return 0
    except Exception as error:  # the entry point: one line for whoever waits, the rest in the log
        logger.exception("could not bring the cluster up")
        report_ready(ready_fd, error=str(error) or type(error).__name__)
        return 1


def _own(config: BringUp, ready_fd: int | None, stop: list[int]) -> int:
    import ray

    start_local_ray(config)
    try:
        actor, address = start_controller(config)
        _tell(ready_fd, actor, address)
        while not stop:
            if wait_closed(actor):
                return 0
    finally:
        ray.shutdown()
    return 0


def _join(config: BringUp, ready_fd: int | None) -> int:
    import ray

    ray.init(
        address=config.spec.ray.address, log_to_driver=False, configure_logging=False, logging_level=logging.WARNING
    )
    try:
        actor, address = start_controller(config)
        _tell(ready_fd, actor, address)
    finally:
        ray.shutdown()
    return 0


def _tell(ready_fd: int | None, actor: Any, address: str) -> None:
    """Says where the controller is, and the operator's token: through the pipe, which only our parent reads."""
    import ray

    if ready_fd is None:
        raise BringUpError("--ready-fd is missing: the operator's token is not for a terminal or a log")
    token = ray.get(actor.operator_token.remote(), timeout=START_TIMEOUT_S)
    gcs = ray.get_runtime_context().gcs_address
    report_ready(ready_fd, control=address, ray_address=gcs, operator_token=token)


def start_local_ray(config: BringUp) -> None:
    """A Ray head of our own on this machine: no dashboard, no CPUs to schedule on, our device slots."""
    spec = config.spec
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave *_VISIBLE_DEVICES of 0-GPU actors alone
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15, for the actors and all that they start
    os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
    import ray

    slots = spec.ray.cpu_devices
    if slots is None:
        slots = max(spec.width, len(os.sched_getaffinity(0)))

    def begin() -> None:
        ray.init(
            address="local",
            include_dashboard=False,
            _node_ip_address=LOOPBACK,  # else Ray listens on the address of the machine's default route
            num_cpus=0,
            num_gpus=spec.ray.gpus,
            resources={"cpu_device": slots} if slots else {},
            labels={"node": "local"},
            object_store_memory=spec.ray.object_store_mib << 20,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.WARNING,
            _temp_dir=str(config.ray_temp_dir) if config.ray_temp_dir else None,
        )

    start_patiently(begin)


def start_patiently(begin: Callable[[], None]) -> None:
    """Calls `begin` again when Ray gave up on its own raylet: it does after a fixed 30 s, on a busy machine too.

    What the failed attempt left below this process is killed first. Raises the last attempt's error.
    """
    for attempt in range(1, RAY_ATTEMPTS + 1):
        try:
            begin()
            return
        except Exception as error:  # Ray raises this one as a bare Exception
            if RAY_GAVE_UP not in str(error) or attempt == RAY_ATTEMPTS:
                raise
            logger.warning("Ray did not start in its 30 s, attempt %d of %d", attempt, RAY_ATTEMPTS)
            for pid in descendants(os.getpid()):
                send(pid, signal.SIGKILL)


def start_controller(config: BringUp) -> tuple[Any, str]:
    """Creates the controller actor on the head node; returns it and its address. Raises BringUpError."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from megatoken.cluster.controller.main import ControllerActor
    from megatoken.cluster.ray.actors import CONTROLLER_NAME, namespace_of
    from megatoken.cluster.ray.inventory import inventory_of

    spec = config.spec
    inventory = inventory_of(ray.nodes())
    head = next((node for node in inventory.nodes if node.head and node.alive), None)
    if head is None:
        raise BringUpError("ray.address: the Ray cluster has no living head node")
    actor = (
        ray.remote(ControllerActor)
        .options(
            name=CONTROLLER_NAME,
            namespace=namespace_of(spec.cluster),
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=4,
            scheduling_strategy=NodeAffinitySchedulingStrategy(head.id, soft=False),
        )
        .remote(
            spec.cluster,
            str(config.state_file or ""),
            str(config.runtime_root),
            head.address,
            spec.model_dump_json(),
        )
    )
    address, problem = ray.get(actor.address.remote(START_TIMEOUT_S), timeout=START_TIMEOUT_S + 10)
    if problem or not address:
        ray.kill(actor, no_restart=True)
        raise BringUpError(problem or f"the controller did not serve within {START_TIMEOUT_S:.0f} s")
    return actor, address


def wait_closed(actor: Any) -> bool:
    """Waits a little; True once the cluster was taken down. A restarting controller is waited for."""
    import time

    import ray

    try:
        return bool(ray.get(actor.wait_closed.remote(WATCH_S), timeout=WATCH_S + START_TIMEOUT_S))
    except ray.exceptions.RayActorError:
        time.sleep(0.2)  # Ray restarts it
        return False


if __name__ == "__main__":
    sys.exit(main())
