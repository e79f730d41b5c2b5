"""Starts a cluster's controller for the command line, and the processes that own a local cluster. Shell code.

A local cluster is guard -> owner -> Ray; see guard.py. With `attached`, the guard holds the other end of a pipe of
ours, so that the cluster ends when this process does, however it ends.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megatoken.access.files import write_private
from megatoken.cluster.client.control import CommandError, Unreachable, client_of
from megatoken.cluster.client.progress import Progress
from megatoken.cluster.client.records import (
    ClusterRecord,
    alive,
    forget,
    record_path,
    token_path,
    write_record,
    write_token,
)
from megatoken.cluster.runtime_dirs import (
    cluster_directory,
    controller_directory,
    make_private,
    runtime_root,
    state_directory,
    state_path,
)
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.start.examined import examine_nodes
from megatoken.cluster.start.owner import BringUp

READY_TIMEOUT_S = 300.0
LOG_TAIL_LINES = 15


@dataclass
class Up:
    """A cluster whose controller serves."""

    record: ClusterRecord
    guard: subprocess.Popen[bytes] | None
    """Local clusters: the process to wait for."""
    lifeline: int | None
    """Attached: closing it, or ending, takes the cluster down."""


def bring_up(spec: ClusterSpec, progress: Progress, *, attached: bool, doctor: bool = True) -> Up:
    """Starts Ray if it is local, and the controller; writes the cluster down. Raises CommandError.

    `doctor`: examines the nodes first, and starts nothing where something would stop the launch.
    """
    local = spec.ray.address == "local"
    root, states = runtime_root(os.environ, local=local), state_directory(os.environ)
    _refuse_running(states, spec.cluster)
    if doctor:
        examine_nodes(spec, progress)
    directory, kept = cluster_directory(root, spec.cluster), controller_directory(os.environ, spec.cluster)
    try:
        make_private(root)
        make_private(states)
        if local:  # of a cluster whose guard was killed
            shutil.rmtree(directory, ignore_errors=True)
            shutil.rmtree(kept, ignore_errors=True)
        make_private(directory)
    except OSError as error:  # an UnsafeDirectory, most likely
        raise CommandError(str(error), 2) from None
    ray_temp = Path(tempfile.mkdtemp(prefix="mt-ray-")) if local else None
    config = directory / "bring-up.json"
    # Elsewhere the user may have another home: only a place that was named holds on every machine.
    state_file = state_path(os.environ, spec.cluster) if local or os.environ.get("MEGATOKEN_RUNTIME_DIR") else None
    bring_up_config = BringUp(spec=spec, runtime_root=root, state_file=state_file, ray_temp_dir=ray_temp)
    write_private(config, bring_up_config.model_dump_json())
    progress.say("starting a local Ray" if local else f"connecting to the Ray cluster at {spec.ray.address}")
    known = [record_path(states, spec.cluster), token_path(states, spec.cluster)]
    started = _Started(directory, ray_temp, [*known, kept], config, local, attached)
    ready = started.wait_ready(progress)
    if "error" in ready:
        started.end()
        raise CommandError(str(ready["error"]), 2)
    record = ClusterRecord(
        cluster=spec.cluster,
        control=ready["control"],
        ray_address=ready.get("ray_address", ""),
        guard_pid=started.process.pid if local else 0,
        runtime_dir=str(directory),
        tls=spec.security.client_tls,
        token_file=str(write_token(states, spec.cluster, ready["operator_token"])),
    )
    write_record(states, record)
    progress.say(f"controller serves at {record.control}; Ray at {record.ray_address}")
    return Up(record, started.process if local else None, started.lifeline)


class _Started:
    """The process that brings the controller up: the guard, or a helper that ends by itself."""

    def __init__(
        self, directory: Path, ray_temp: Path | None, known: list[Path], config: Path, local: bool, attached: bool
    ) -> None:
        self.log = directory / "owner.log"
        ready_read, ready_write = os.pipe()
        lifeline_read: int | None = None
        self.lifeline: int | None = None
        if attached and local:
            lifeline_read, self.lifeline = os.pipe()
        owner = [
            sys.executable,
            "-m",
            "megatoken.cluster.start.owner",
            "--config",
            str(config),
            "--ready-fd",
            str(ready_write),
        ]
        command, passed = [*owner, "--orphan"] if not local else owner, [ready_write]
        if local:
            clean = [directory, *known, *([ray_temp] if ray_temp else [])]
            guard = [sys.executable, "-m", "megatoken.cluster.start.guard", "--ready-fd", str(ready_write)]
            for path in clean:
                guard += ["--clean", str(path)]
            if lifeline_read is not None:
                guard += ["--lifeline-fd", str(lifeline_read)]
                passed.append(lifeline_read)
            command = [*guard, "--", *owner]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=passed,
                start_new_session=True,  # the terminal's Ctrl-C is ours to handle
                env=_environment(directory) if local else dict(os.environ),
            )
        os.close(ready_write)
        if lifeline_read is not None:
            os.close(lifeline_read)
        self._ready = ready_read

    def wait_ready(self, progress: Progress) -> dict[str, str]:
        """The ready line. Raises CommandError with the end of the log when none comes."""
        deadline, said = time.monotonic() + READY_TIMEOUT_S, b""
        try:
            while b"\n" not in said:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    self.end()
                    raise CommandError(f"the controller did not serve within {READY_TIMEOUT_S:.0f} s\n{self._tail()}")
                if select.select([self._ready], [], [], min(left_s, 1.0))[0]:
                    chunk = os.read(self._ready, 65_536)
                    if not chunk:
                        self.end()
                        raise CommandError(f"the cluster did not come up\n{self._tail()}")
                    said += chunk
                progress.still("still starting")
        except KeyboardInterrupt:
            self.end()
            raise
        finally:
            os.close(self._ready)
        facts: dict[str, str] = json.loads(said)
        return facts

    def end(self) -> None:
        """Ends it and whatever it started."""
        self.tail = self._tail()
        self.process.terminate()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _tail(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        except OSError:
            lines = getattr(self, "tail", "").splitlines()
        return "\n".join(lines)


def _refuse_running(states: Path, cluster: str) -> None:
    path = record_path(states, cluster)
    try:
        record = ClusterRecord.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return
    if alive(record.guard_pid) if record.guard_pid else _answers(record):
        raise CommandError(
            f"cluster: {cluster!r} is not allowed; a cluster of that name runs, controller at {record.control}. "
            "Use `megatoken apply`, or `megatoken down` first",
            2,
        )
    forget(states, cluster)


def _answers(record: ClusterRecord) -> bool:
    """Whether a controller on somebody's Ray is still there; it may have been lost with its node."""
    with client_of(record) as client:
        try:
            client.status()
        except Unreachable:
            return False
        except CommandError:
            return True  # it refuses us, so it is there
    return True


def _environment(directory: Path) -> dict[str, str]:
    """A local Ray of our own: token authentication with a fresh token in a file only this user can read."""
    token = directory / "ray.token"
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    return {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
