"""Keeps a cluster's secrets in one file, brings every process to know them, and rotates them while the cluster runs.

A rotation goes in steps, and each waits until every process has the one before: all accept the new secret, then all
show it, then, OVERLAP_S later, none accepts the old. So no call is refused at any moment, and no stream is cut. The
controller asks `untold` and `advance` at every tick, so it goes on where it was when the controller is started again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from megatoken.access.credentials import ClusterSecrets, Credentials, dump, new_secrets
from megatoken.access.files import read_private, write_private
from megatoken.access.table import Identity, Program
from megatoken.errors import RequestError, UnavailableError

OVERLAP_S: Final = 60.0  # an operator's own copy of the token may be fetched within this
PATIENCE_S: Final = 30.0  # a process that takes nothing for this long is out of reach, and fetches it when it returns


class SecretsKeeper:
    """Of one controller. `directory` is the cluster's own, mode 700."""

    def __init__(self, directory: Path) -> None:
        """Reads the secrets, or makes them. Raises RequestError for a file that others may read."""
        self._path, self.own_path = directory / "cluster.secrets", directory / "controller.credentials"
        self._told: dict[str, ClusterSecrets] = {}
        self._step_s: float | None = None
        if self._path.exists():
            try:
                self._current = ClusterSecrets.model_validate_json(read_private(self._path, "cluster.secrets"))
            except ValidationError:  # a disk that was full; every process is told the new ones
                self._current = new_secrets()
        else:
            self._current = new_secrets()
        self._put(self._current)

    @property
    def current(self) -> ClusterSecrets:
        return self._current

    @property
    def operator_token(self) -> str:
        """What an operator shows; after `rotate`, the one to come as soon as it counts everywhere."""
        return self._current.token(Identity.OPERATOR)

    def untold(self, running: Iterable[str]) -> list[str]:
        """Which of these processes do not have the present secrets' credentials yet."""
        running = set(running)
        for gone in self._told.keys() - running:
            del self._told[gone]
        return sorted(name for name in running if self._told.get(name) != self._current)

    def told(self, names: Iterable[str], secrets: ClusterSecrets) -> None:
        """These processes have credentials made from `secrets`."""
        self._told |= dict.fromkeys(names, secrets)

    def rotate(self) -> None:
        """Begins a rotation. Raises UnavailableError while one is under way."""
        if self._current.rotating:
            raise UnavailableError(f"the tokens are being changed already; again in {OVERLAP_S:.0f} s")
        self._step_s = None
        self._put(self._current.begun())

    def advance(self, running: Iterable[str], now: float) -> None:
        """Takes the next step of a rotation once every running process has the last."""
        if not self._current.rotating:
            return
        if self._step_s is None:
            self._step_s = now
        waited_s, untold = now - self._step_s, self.untold(running)
        if self._current.presented:
            if not untold or waited_s >= PATIENCE_S:
                self._step_s = now
                self._put(self._current.switched())
        elif waited_s >= OVERLAP_S and (not untold or waited_s >= OVERLAP_S + PATIENCE_S):
            self._put(self._current.ended())

    def _put(self, secrets: ClusterSecrets) -> None:
        _keep(self._path, dump(secrets))
        _keep(self.own_path, dump(secrets.credentials(Identity.CONTROLLER, Program.CONTROLLER)))
        self._current = secrets


def _keep(path: Path, text: str) -> None:
    """Writes what is not in the file yet: a controller starts again on a full disk."""
    try:
        written = read_private(path, path.name) == text
    except RequestError:
        written = False
    if not written:
        write_private(path, text)


def process_credentials(secrets: ClusterSecrets, kind: str, name: str) -> Credentials | None:
    """Those of a worker (`name` is its replica), router or agent; None for an edge, which shows its callers' keys."""
    match kind:
        case "worker":
            return secrets.credentials(Identity.WORKER, Program.WORKER, name)
        case "router":
            return secrets.credentials(Identity.ROUTER, Program.ROUTER)
        case "agent":
            return secrets.credentials(Identity.AGENT, Program.AGENT)
    return None
