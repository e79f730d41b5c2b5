"""Waits until a Ray cluster that others start has its nodes."""

from __future__ import annotations

import logging
import time

import ray

from megatoken.cluster.client.control import CommandError
from megatoken.cluster.client.progress import Progress
from megatoken.cluster.view.human import duration

POLL_S = 0.5


def wait_for_nodes(address: str, count: int, timeout_s: float, progress: Progress) -> None:
    """Returns once `count` nodes are alive. Raises CommandError when `timeout_s` is over, with how many are there."""
    deadline, alive, why = time.monotonic() + timeout_s, 0, ""
    while True:
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
            try:
                while (alive := sum(bool(node["Alive"]) for node in ray.nodes())) < count:
                    if time.monotonic() > deadline:
                        break
                    progress.still(f"{alive} of {count} nodes have joined")
                    time.sleep(POLL_S)
                else:
                    progress.say(f"{alive} nodes have joined")
                    return
            finally:
                ray.shutdown()
        except (ConnectionError, RuntimeError, ValueError) as error:  # its head may not serve yet
            why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if time.monotonic() > deadline:
            missing = f"{alive} of {count} nodes joined within {duration(timeout_s)}"
            raise CommandError(f"--nodes: {missing}{f'; {why}' if why else ''}")
        progress.still(f"no Ray at {address} yet: {why}")
        time.sleep(POLL_S)
