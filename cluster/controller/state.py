"""Desired state and the fleet in one SQLite file, so that a restarted controller carries on where the last one was.

WAL mode; every save is one transaction. The file belongs to one controller at a time. A damaged file is set aside and
counts as lost. Values are the pydantic spec and
the frozen dataclasses of cluster/decide/fleet.py as JSON.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import TypeAdapter

from megatoken.cluster.decide.cordon import Cordon, HostDevice
from megatoken.cluster.decide.fleet import Desired, Fleet, Replica
from megatoken.cluster.runtime_dirs import make_private
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.model import ModelSpec

logger = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS replicas (id TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS previous (model TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS drained_nodes (node TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS drain_requests (replica TEXT PRIMARY KEY, timeout_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS history (unix_s REAL, model TEXT, point BLOB NOT NULL, PRIMARY KEY (unix_s, model));
CREATE TABLE IF NOT EXISTS cordons (
    host TEXT, device INTEGER, reason TEXT NOT NULL, wanted_back INTEGER NOT NULL, PRIMARY KEY (host, device)
);
"""
BUSY_TIMEOUT_S = 5.0
DAMAGED = ".damaged"
_REPLICA = TypeAdapter(Replica)


class StateStore:
    """Used from one thread (the controller's event loop); a transaction takes well under a millisecond."""

    def __init__(self, path: Path) -> None:
        make_private(path.parent)
        try:
            self._connection = _open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # busy, or a full disk: the file itself is whole
                raise
            _set_aside(path, error)
            self._connection = _open(path)
        self._saved: dict[str, Replica] = {}

    def close(self) -> None:
        self._connection.close()

    # -- desired --

    def spec(self) -> ClusterSpec | None:
        """What was last asked for, or None in a new file."""
        text = self.get("spec")
        return ClusterSpec.model_validate_json(text) if text else None

    def generation(self) -> int:
        return int(self.get("generation") or 0)

    def put_spec(self, spec: ClusterSpec, previous: Mapping[str, ModelSpec | None]) -> int:
        """Makes `spec` the desired one; returns its generation. `previous`: model -> what a rollback returns to."""
        generation = self.generation() + 1
        with self._connection:
            self._put("spec", spec.model_dump_json())
            self._put("generation", str(generation))
            for model, value in previous.items():
                self._connection.execute("DELETE FROM previous WHERE model = ?", (model,))
                if value is not None:
                    self._connection.execute("INSERT INTO previous VALUES (?, ?)", (model, value.model_dump_json()))
        return generation

    def forget_previous(self, models: Iterable[str]) -> None:
        """Drops what rollbacks of these models would return to."""
        with self._connection:
            self._connection.executemany("DELETE FROM previous WHERE model = ?", [(model,) for model in models])

    def drain_node(self, node: str, *, undo: bool = False) -> None:
        statement = "DELETE FROM drained_nodes WHERE node = ?" if undo else "REPLACE INTO drained_nodes VALUES (?)"
        with self._connection:
            self._connection.execute(statement, (node,))

    def cordon(self, place: HostDevice, cordon: Cordon | None) -> None:
        """Takes a device out of service, or back (None)."""
        with self._connection:
            if cordon is None:
                self._connection.execute("DELETE FROM cordons WHERE host = ? AND device = ?", place)
            else:
                values = (*place, cordon.reason, int(cordon.returning))
                self._connection.execute("REPLACE INTO cordons VALUES (?, ?, ?, ?)", values)

    def drain_replica(self, replica: str, timeout_s: float) -> None:
        with self._connection:
            self._connection.execute("REPLACE INTO drain_requests VALUES (?, ?)", (replica, timeout_s))

    def desired(self, *, stopping: bool = False) -> Desired:
        spec = self.spec()
        rows = self._connection.execute("SELECT model, value FROM previous").fetchall()
        nodes = self._connection.execute("SELECT node FROM drained_nodes").fetchall()
        cordons = self._connection.execute("SELECT host, device, reason, wanted_back FROM cordons").fetchall()
        drains = self._connection.execute("SELECT replica, timeout_s FROM drain_requests").fetchall()
        return Desired(
            generation=self.generation(),
            models=spec.models if spec else (),
            previous={model: ModelSpec.model_validate_json(value) for model, value in rows},
            drained_nodes=frozenset(node for (node,) in nodes),
            cordons={(host, device): Cordon(reason, bool(back)) for host, device, reason, back in cordons},
            drain_requests=dict(drains),
            stopping=stopping,
        )

    # -- fleet --

    def fleet(self) -> Fleet:
        rows: Iterable[tuple[str]] = self._connection.execute("SELECT value FROM replicas ORDER BY rowid")
        replicas = tuple(_REPLICA.validate_json(value) for (value,) in rows)
        self._saved = {replica.id: replica for replica in replicas}
        return Fleet(replicas=replicas, serial=int(self.get("serial") or 0))

    def save_fleet(self, fleet: Fleet) -> None:
        """Writes what changed since the last save."""
        now = {replica.id: replica for replica in fleet.replicas}
        changed = [replica for replica in fleet.replicas if self._saved.get(replica.id) != replica]
        gone = [(replica_id,) for replica_id in self._saved if replica_id not in now]
        if not changed and not gone:
            return
        with self._connection:
            for replica in changed:
                value = _REPLICA.dump_json(replica).decode()
                self._connection.execute(
                    "INSERT INTO replicas VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET value = excluded.value",
                    (replica.id, value),
                )
            self._connection.executemany("DELETE FROM replicas WHERE id = ?", gone)
            self._connection.executemany("DELETE FROM drain_requests WHERE replica = ?", gone)
            self._put("serial", str(fleet.serial))
        self._saved = now

    # -- history --

    def add_history(self, points: Iterable[tuple[float, str, bytes]], kept_s: float) -> None:
        """Adds points (unix time, model, bytes), and drops those older than `kept_s` before them."""
        rows = list(points)
        with self._connection:
            self._connection.executemany("REPLACE INTO history VALUES (?, ?, ?)", rows)
            oldest_s = max((unix_s for unix_s, _, _ in rows), default=0.0) - kept_s
            self._connection.execute("DELETE FROM history WHERE unix_s < ?", (oldest_s,))

    def history(self, since_s: float) -> list[bytes]:
        """The points after a time, oldest first."""
        query = "SELECT point FROM history WHERE unix_s > ? ORDER BY unix_s, model"
        return [point for (point,) in self._connection.execute(query, (since_s,)).fetchall()]

    # -- small values --

    def get(self, key: str) -> str | None:
        row = self._connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else None

    def put(self, **values: str) -> None:
        """Writes small values in one transaction."""
        with self._connection:
            for key, value in values.items():
                self._put(key, value)

    def ports(self) -> dict[str, int]:
        """Ports that were found free when the spec named none; kept, so that a restart keeps its address."""
        found: dict[str, int] = json.loads(self.get("ports") or "{}")
        return found

    def put_ports(self, ports: Mapping[str, int]) -> None:
        self.put(ports=json.dumps(dict(ports)))

    def _put(self, key: str, value: str) -> None:
        self._connection.execute("REPLACE INTO meta VALUES (?, ?)", (key, value))


def _open(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.DatabaseError for a file that is none of SQLite's, or of which a part is missing."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level="IMMEDIATE")
    try:
        path.chmod(0o600)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        connection.executescript(SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def _set_aside(path: Path, error: sqlite3.DatabaseError) -> None:
    """A damaged file is kept for people and started anew: a controller that cannot start helps nobody."""
    logger.error("state file %s is damaged (%s); it is kept as %s%s", path, error, path.name, DAMAGED)
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.replace(path.with_name(path.name + DAMAGED + suffix))
