"""Applies a membership snapshot to the table: pure, and the only way that replicas come and go.

Snapshots are whole and ordered by (epoch, version); an older one is ignored. A replica whose incarnation changed is a
new replica. Called by the membership watch (shell) and by tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatoken.router.fleet.fleet import Endpoint, EndpointTable, Member, Policy, index_members
from megatoken.v1 import membership_pb2


@dataclass(slots=True)
class Change:
    """What a snapshot did, for the shell to act on."""

    added: list[Endpoint] = field(default_factory=list)
    removed: list[Endpoint] = field(default_factory=list)
    drained: list[Endpoint] = field(default_factory=list)  # started to drain now
    problems: list[str] = field(default_factory=list)  # what of it could not be done, one sentence each


def member_of(message: membership_pb2.ReplicaMember) -> Member:
    return Member(
        replica=message.replica,
        model=message.model,
        address=message.address,
        incarnation=message.incarnation,
        draining=message.phase == membership_pb2.REPLICA_PHASE_DRAINING,
        drain_deadline_unix_s=message.drain_deadline_unix_s,
        node=message.node,
        site=message.site,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        max_running=message.max_running,
        block_size=message.block_size,
        engine=message.engine,
        device_kind=message.device_kind,
        loras=tuple(message.loras),
    )


def apply_snapshot(
    fleet: EndpointTable, snapshot: membership_pb2.Snapshot, policy_of: Callable[[str], Policy], now: float
) -> Change | None:
    """Makes the table what the snapshot says; None when it is not newer than the one applied last.

    `policy_of` makes a policy from a name ("" is the router's default).
    """
    if (snapshot.epoch, snapshot.version) <= (fleet.epoch, fleet.version) and (fleet.epoch or fleet.version):
        return None
    fleet.epoch, fleet.version, fleet.told = snapshot.epoch, snapshot.version, True
    change = Change()
    _apply_models(fleet, snapshot, policy_of, change)
    wanted: set[tuple[str, int]] = set()
    for message in snapshot.replicas:
        member = member_of(message)
        key = (member.replica, member.incarnation)
        wanted.add(key)
        pool = fleet.pools.get(member.model) or fleet.add_pool(member.model, policy_of(""))
        pool.known = True
        replica = fleet.by_name.get(key)
        if replica is None:
            replica = fleet.add(member, pool)
            change.added.append(replica)
            continue
        if replica.member != member:
            replica.member = member
            index_members(pool)
        if member.draining and not replica.draining:
            change.drained.append(replica)
        replica.draining = member.draining
        fleet.refresh(replica, now)
    for key, replica in list(fleet.by_name.items()):
        if key not in wanted:
            fleet.remove(replica)
            change.removed.append(replica)
    return change


def _apply_models(
    fleet: EndpointTable, snapshot: membership_pb2.Snapshot, policy_of: Callable[[str], Policy], change: Change
) -> None:
    for pool in fleet.pools.values():
        pool.known = False
        pool.wanted, pool.hold_s = 0, 0.0
        pool.blocked = ""
    for model in snapshot.models:
        present = fleet.pools.get(model.model)
        try:
            policy = policy_of(model.policy)
        except ValueError as error:  # of a newer controller, say: requests go on by the policy that there is
            policy = policy_of("") if present is None else present.policy
            change.problems.append(f"model {model.model}: {error}; {policy.name} stays in force")
        pool = present or fleet.add_pool(model.model, policy)
        if policy.name != pool.policy.name:
            pool.policy = policy
        pool.known = True
        pool.wanted, pool.hold_s = model.replicas_wanted, model.hold_s
        pool.blocked = model.blocked
