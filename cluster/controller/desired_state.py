"""What was asked for, and how commands change it: apply, scale, drain, shut down, roll back.

Keeps the desired state in the state file and in memory; the control loop reads `desired` every tick. Wrong ones raise
one of megatoken.errors and change nothing. Lives in the controller's event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.decide.cordon import Cordon
from megatoken.cluster.decide.fleet import ClusterEvent, Desired, Fleet, Replica
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.inventory.topology import Inventory, Node
from megatoken.cluster.planning.check import shape_of
from megatoken.cluster.planning.need import device_need_bytes
from megatoken.cluster.spec.changes import changes_between, previous_specs
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.model import ModelSpec
from megatoken.errors import NotFoundError, RequestError

NODE_ID_CHARS = 6  # of a node id are enough to mean it
DRAIN_WITHOUT_MODEL_S = 30.0


class DesiredState:
    """The desired state of one cluster. `tell` writes an event down; `changed` wakes the control loop."""

    def __init__(self, store: StateStore, tell: Callable[[ClusterEvent], None], changed: Callable[[], None]) -> None:
        spec = store.spec()
        if spec is None:
            raise ValueError("the state file holds no spec")
        self.spec: ClusterSpec = spec
        self.stopping = store.get("stopping") == "1"
        self._store, self._tell, self._changed = store, tell, changed
        self.desired: Desired = self._read()

    def apply(self, spec: ClusterSpec, fleet: Fleet, *, dry_run: bool) -> tuple[int, list[str]]:
        """Makes `spec` the desired one; returns its generation and what changes. Raises SpecError."""
        spec = with_present_sizes(spec, self.spec)
        changes = changes_between(self.spec, spec)
        if not dry_run and changes:
            self._take(spec, previous_specs(self.spec, spec, self.desired.previous, settled_models(self.spec, fleet)))
            self._tell(
                ClusterEvent("spec.applied", f"generation {self.desired.generation}", "; ".join(changes), "apply")
            )
        return self.desired.generation, changes

    def scale(self, model: str, replicas: int) -> int:
        """Asks for another number of replicas; returns the generation. Raises NotFoundError, RequestError."""
        spec, before = self.scaled(model, replicas), self.spec.model(model)
        if before is not None and replicas != before.replicas:
            self._take(spec, {})
            self._tell(ClusterEvent("model.scaled", model, f"{before.replicas} -> {replicas} replicas", "scale"))
        return self.desired.generation

    def scaled(self, model: str, replicas: int) -> ClusterSpec:
        """The spec with another number of replicas. Raises NotFoundError, RequestError."""
        before = self.spec.model(model)
        if before is None:
            known = ", ".join(entry.name for entry in self.spec.models) or "none"
            raise NotFoundError("model", model, f"one of: {known}")
        if before.autoscale is not None:
            bounds = f"{before.autoscale.min_replicas} to {before.autoscale.max_replicas}"
            rule = f"its number follows the load ({bounds}); apply other bounds, or none"
            raise RequestError("replicas", replicas, rule)
        return self.spec.with_replicas(model, replicas)

    def resize(self, model: str, replicas: int, why: str) -> None:
        """What autoscaling decided."""
        before = self.spec.model(model)
        if before is not None and replicas != before.replicas:
            self._take(self.spec.with_replicas(model, replicas), {})
            message = f"{before.replicas} -> {replicas} replicas: {why}"
            self._tell(ClusterEvent("model.scaled", model, message, "autoscale"))

    def drain_replica(self, replica_id: str, timeout_s: float | None, fleet: Fleet) -> list[str]:
        """Takes one replica out of service; another replaces it. Raises NotFoundError."""
        replica = fleet.replica(replica_id)
        if replica is None or not replica.live:
            known = ", ".join(entry.id for entry in fleet.replicas if entry.live) or "none"
            raise NotFoundError("replica", replica_id, f"a live replica, one of: {known}")
        model = self.spec.model(replica.model)
        default_s = model.drain_timeout_s if model else DRAIN_WITHOUT_MODEL_S
        self._store.drain_replica(replica_id, default_s if timeout_s is None else timeout_s)
        self._refresh()
        self._tell(ClusterEvent("replica.drain", replica_id, "drain asked for", "drain"))
        return [replica_id]

    def drain_node(self, name: str, inventory: Inventory, fleet: Fleet, *, undo: bool) -> list[str]:
        """Takes a node out of service, or back; returns the replicas that go. Raises NotFoundError, RequestError."""
        node = find_node(name, inventory)
        self._store.drain_node(node.host, undo=undo)
        self._refresh()
        self._tell(ClusterEvent("node.drain", node.title, "back in service" if undo else "drain asked for", "drain"))
        return [] if undo else [r.id for r in fleet.replicas if r.live and node.id in r.placement.nodes]

    def cordon(self, name: str, device: int, reason: str, inventory: Inventory, fleet: Fleet) -> list[str]:
        """Takes a device out of service; returns the replicas that go. Raises NotFoundError, RequestError."""
        node = self._device(name, device, inventory)
        self._set_cordon(node, device, Cordon(reason), reason or "cordon asked for")
        here = (node.id, device)
        return [r.id for r in fleet.replicas if r.live and here in {(k.node, k.device) for k in r.placement.ranks}]

    def uncordon(self, name: str, device: int, inventory: Inventory) -> None:
        """Has a cordoned device checked, to be taken back if it is well. Raises NotFoundError, RequestError."""
        node = self._device(name, device, inventory)
        cordon = self.desired.cordons.get((node.host, device))
        if cordon is None:
            raise RequestError("device", f"{name}:{device}", "a cordoned device")
        self._set_cordon(node, device, replace(cordon, returning=True), "it is checked before it returns")

    def end_check(self, node: Node, device: int, problem: str) -> None:
        """A check of a device ended. `problem`: what it found; empty: the device is well."""
        if (node.host, device) in self.desired.cordons:
            after = Cordon(f"a check: {problem}") if problem else None
            self._set_cordon(node, device, after, problem or "back in service")

    def _set_cordon(self, node: Node, device: int, cordon: Cordon | None, message: str) -> None:
        self._store.cordon((node.host, device), cordon)
        self._refresh()
        self._tell(ClusterEvent("device.cordon", f"{node.title}:{device}", message, "cordon"))

    def _device(self, name: str, device: int, inventory: Inventory) -> Node:
        node = find_node(name, inventory)
        if device not in {entry.index for entry in node.devices}:
            known = ", ".join(str(entry.index) for entry in node.devices) or "none"
            raise RequestError("device", f"{name}:{device}", f"one of this node's: {known}")
        return node

    def shut_down(self, drain_timeout_s: float, fleet: Fleet) -> None:
        """Everything drains and ends; the control loop sees when nothing is left."""
        for replica in fleet.replicas:
            if replica.live:
                self._store.drain_replica(replica.id, drain_timeout_s)
        self.stopping = True
        self._store.put(stopping="1")
        self._refresh()
        message = f"drains, at most {drain_timeout_s:.0f} s"
        self._tell(ClusterEvent("cluster.stopping", self.spec.cluster, message, "down"))

    def roll_back(self, model: str) -> None:
        """Puts a model's previous spec back, with as many replicas as are wanted now."""
        previous, present = self.desired.previous.get(model), self.spec.model(model)
        if previous is not None and present is not None:
            restored = previous.model_copy(update={"replicas": present.replicas})
            self._take(self.spec.with_model(restored), {model: None})

    def settle_updates(self, fleet: Fleet) -> None:
        """Forgets what an update came from once all its replicas are exchanged."""
        done = settled_models(self.spec, fleet) & self.desired.previous.keys()
        if done:
            self._store.forget_previous(done)
            self._refresh()
            for name in sorted(done):
                self._tell(ClusterEvent("model.updated", name, "every replica runs the new spec", "reconcile"))

    def model_of(self, replica: Replica) -> ModelSpec | None:
        """The spec a replica was made from: the wanted one, or the one it is being updated from."""
        candidates = (self.spec.model(replica.model), self.desired.previous.get(replica.model))
        return next((model for model in candidates if model and model.revision == replica.revision), None)

    def proven_spec(self, fleet: Fleet) -> ClusterSpec:
        """The spec, with an updated model as it was until a replica of the new one serves."""
        spec = self.spec
        for name, previous in self.desired.previous.items():
            model = spec.model(name)
            if model is not None and not any(
                replica.state is ReplicaState.READY and replica.revision == model.revision
                for replica in fleet.of_model(name)
            ):
                spec = spec.with_model(previous)
        return spec

    def _take(self, spec: ClusterSpec, previous: Mapping[str, ModelSpec | None]) -> None:
        self._store.put_spec(spec, previous)
        self.spec = spec
        self._refresh()

    def _refresh(self) -> None:
        self.desired = self._read()
        self._changed()

    def _read(self) -> Desired:
        needs = {model.name: device_need_bytes(model, shape_of(model)) for model in self.spec.models}
        return replace(self._store.desired(stopping=self.stopping), device_needs=needs)


def with_present_sizes(spec: ClusterSpec, present: ClusterSpec) -> ClusterSpec:
    """`spec`, where a model whose number follows the load keeps the present one, within its bounds."""
    for model in spec.models:
        before = present.model(model.name)
        if model.autoscale is not None and before is not None:
            least, most = model.autoscale.min_replicas, model.autoscale.max_replicas
            spec = spec.with_replicas(model.name, min(max(before.replicas, least), most))
    return spec


def settled_models(spec: ClusterSpec, fleet: Fleet) -> frozenset[str]:
    """Models whose wanted spec is known to work: a replica of it is READY, and none of another runs."""
    found = set()
    for model in spec.models:
        active = [replica for replica in fleet.of_model(model.name) if replica.active]
        ready = any(replica.state is ReplicaState.READY for replica in active)
        if ready and all(replica.revision == model.revision for replica in active):
            found.add(model.name)
    return frozenset(found)


def find_node(name: str, inventory: Inventory) -> Node:
    """The node of that name, address or beginning of its id; a living one where several are. Raises RequestError."""
    matches = [
        node
        for node in inventory.nodes
        if name in (node.name, node.address) or (len(name) >= NODE_ID_CHARS and node.id.startswith(name))
    ]
    alive = [node for node in matches if node.alive] or matches
    if not alive:
        known = ", ".join(node.title for node in inventory.nodes) or "none"
        raise NotFoundError("node", name, f"one of: {known}")
    if len(alive) > 1:
        raise RequestError("node", name, f"several nodes have it; use an id: {', '.join(node.id for node in alive)}")
    return alive[0]
