"""Routers, edges and agents are brought to what the spec wants, and all processes to know the present secrets.

The shell around cluster/decide/processes.py and cluster/secrets_keeper.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

from megatoken.access.credentials import dump
from megatoken.cluster.decide.backend import Backend, BackendState
from megatoken.cluster.decide.fleet import ClusterEvent, Phase
from megatoken.cluster.decide.processes import Decision, Record, Wanted, supervise
from megatoken.cluster.secrets_keeper import SecretsKeeper, process_credentials

STOP_GRACE_S = 5.0  # of a worker that has no request left, and of a process whose cluster goes down
CREDENTIALS_S = 2.0  # for processes to take new credentials; those that did not are told again at the next tick
STARTED = (Phase.STARTING, Phase.SERVING)


class InThread(Protocol):
    """Runs a call of the Backend on the one thread where it may be called."""

    def __call__(self, call: Callable[[], Any], /) -> Awaitable[Any]: ...


class Processes:
    """Lives in the controller's event loop. `survived` is told what failed and goes on, where it is caught."""

    def __init__(
        self,
        secrets: SecretsKeeper,
        in_thread: InThread,
        tell: Callable[[ClusterEvent], None],
        survived: Callable[[str], None],
    ) -> None:
        self.records: Mapping[str, Record] = {}
        self._secrets, self._in_thread, self._tell, self._survived = secrets, in_thread, tell, survived

    @property
    def moving(self) -> bool:
        """Whether one is on its way up or down."""
        return any(record.state not in ("READY", "FAILED") for record in self.records.values())

    def addresses(self, kind: str, state: BackendState) -> dict[str, str]:
        """Where the controller reaches those of a kind that are ready."""
        found = {}
        for name, record in self.records.items():
            seen = state.processes.get(name)
            if record.kind == kind and record.state == "READY" and seen is not None and seen.facts:
                # Routers of a node share an address; each has one of its own for us.
                found[name] = str(seen.facts.get("own_address") or seen.facts["address"])
        return found

    async def supervise(
        self, backend: Backend, state: BackendState, wanted: Iterable[Wanted], now: float, *, stopping: bool
    ) -> bool:
        """Starts and stops what the wanted ones need; says whether any is left. `state` is complete."""
        decision = supervise(wanted, state.processes, self.records, now)
        self.records = decision.records
        for name, record in decision.changed:
            message = record.state + (f": {record.reason}" if record.reason else "")
            self._tell(ClusterEvent("process.state", name, message, "observed", {"kind": record.kind}))
        if decision.start or decision.stop:
            await self._in_thread(lambda: self._call_all(backend, decision, STOP_GRACE_S if stopping else float("inf")))
        return bool(state.processes or decision.start)

    def _call_all(self, backend: Backend, decision: Decision, grace_max_s: float) -> None:
        """Each by itself: one that raises takes no other along, and the next tick asks for it again."""
        for launch in decision.start:
            try:
                backend.start_process(launch)
            except Exception:
                self._survived("start of a process")
        for name, grace_s in decision.stop:
            try:
                backend.stop_process(name, min(grace_s, grace_max_s))
            except Exception:
                self._survived("stop of a process")

    async def tell_secrets(self, backend: Backend, state: BackendState, now: float) -> None:
        """Brings every running process to know the present secrets, and a rotation to its next step."""
        kinds = {name: "worker" for name, seen in state.replicas.items() if seen.phase in STARTED}
        kinds |= {name: name.partition("-")[0] for name, seen in state.processes.items() if seen.phase in STARTED}
        self._secrets.advance(kinds, now)
        secrets = self._secrets.current
        untold = self._secrets.untold(kinds)
        made = {name: process_credentials(secrets, kinds[name], name) for name in untold}
        self._secrets.told([name for name, own in made.items() if own is None], secrets)
        texts = {name: dump(own) for name, own in made.items() if own is not None}
        if texts:
            took = await self._in_thread(lambda: backend.give_credentials(texts, CREDENTIALS_S))
            self._secrets.told(took, secrets)
