"""What a spec would become on an inventory, without touching anything. Pure; `megatoken plan` prints it.

For each model it also lists every TP x PP split that the model allows and the devices hold, in the expected order of
throughput (order.py has that model).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatoken.cluster.decide.request import request_for
from megatoken.cluster.inventory.model_memory import parallel_problems, tensor_sizes
from megatoken.cluster.inventory.model_shape import ModelShape
from megatoken.cluster.inventory.topology import CPU_KIND, Device, Inventory, Node
from megatoken.cluster.placement.free_devices import FreeDevices, refusal
from megatoken.cluster.placement.place import (
    Blocked,
    BlockedKind,
    Outcome,
    Placement,
    ReplicaRequest,
    Separate,
    TpSpan,
    place,
)
from megatoken.cluster.planning.need import device_need_bytes, need_of
from megatoken.cluster.planning.order import rate_of
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.model import ModelSpec

MAX_STAGES = 64
MAX_ALTERNATIVES = 24  # splits listed for a model
MAX_TRIED = 1024  # replicas placed to count how many fit, where they cannot be counted otherwise


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to split a model over the whole inventory."""

    tensor: int
    pipeline: int
    replicas: int
    device_kind: str
    unused: int
    """Allowed devices that it leaves idle."""
    need_bytes: int
    device_bytes: int
    """The smallest allowed device; 0: unknown."""
    kv_tokens: int
    """Tokens of KV cache a replica; 0: unknown."""
    rate: float
    """Expected tokens/s of all replicas, to order by; see order.py."""
    chosen: bool


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model: its replicas' places, what is wrong with it, and how else it could be split."""

    model: str
    wanted: int
    outcomes: tuple[Outcome, ...]
    problems: tuple[str, ...]
    need_bytes: int
    alternatives: tuple[Alternative, ...]

    @property
    def placed(self) -> int:
        return sum(isinstance(outcome, Placement) for outcome in self.outcomes)


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """A whole spec on a whole inventory."""

    models: tuple[ModelPlan, ...]
    inventory: Inventory
    unused: tuple[tuple[Node, Device], ...]
    """Healthy devices of living nodes that hold no rank."""

    @property
    def complete(self) -> bool:
        return all(model.placed == model.wanted for model in self.models)

    @property
    def placements(self) -> list[Placement]:
        return [o for model in self.models for o in model.outcomes if isinstance(o, Placement)]


def plan_cluster(
    spec: ClusterSpec,
    inventory: Inventory,
    shapes: Mapping[str, ModelShape],
    *,
    alternatives: bool = True,
) -> ClusterPlan:
    """`shapes`: by model name; a model without one is placed by its sizes alone."""
    requests = []
    problems: dict[str, tuple[str, ...]] = {}
    for model in spec.models:
        shape = shapes.get(model.name)
        problems[model.name] = _problems(model, shape)
        if not problems[model.name]:
            need = device_need_bytes(model, shape)
            found = [request_for(model, f"{model.name}-{number}") for number in range(model.replicas)]
            requests += [replace(request, device_memory_bytes=need) for request in found]
    outcomes: dict[str, list[Outcome]] = {}
    for outcome in place(requests, inventory):
        outcomes.setdefault(outcome.model, []).append(outcome)
    models = tuple(
        ModelPlan(
            model.name,
            model.replicas,
            tuple(outcomes.get(model.name, ())) or _refused(model, problems[model.name]),
            problems[model.name],
            device_need_bytes(model, shapes.get(model.name)),
            tuple(_alternatives(model, shapes[model.name], inventory)) if alternatives and model.name in shapes else (),
        )
        for model in spec.models
    )
    placements = [o for found in outcomes.values() for o in found if isinstance(o, Placement)]
    return ClusterPlan(models, inventory, _unused(inventory, placements))


def _problems(model: ModelSpec, shape: ModelShape | None) -> tuple[str, ...]:
    if shape is None:
        return ()
    sizes = model.parallel
    return parallel_problems(shape, tensor=sizes.tensor, pipeline=sizes.pipeline, data=sizes.data, expert=sizes.expert)


def _refused(model: ModelSpec, problems: Sequence[str]) -> tuple[Outcome, ...]:
    if not problems:
        return ()
    reason = "; ".join(problems) + "."
    return tuple(
        Blocked(f"{model.name}-{number}", model.name, BlockedKind.SPEC, reason, "Change the sizes.")
        for number in range(model.replicas)
    )


def _unused(inventory: Inventory, placements: Sequence[Placement]) -> tuple[tuple[Node, Device], ...]:
    used = {(rank.node, rank.device) for placement in placements for rank in placement.ranks}
    return tuple(
        (node, device)
        for node, device in inventory.devices()
        if node.alive and not node.draining and device.healthy and (node.id, device.index) not in used
    )


def _alternatives(model: ModelSpec, shape: ModelShape, inventory: Inventory) -> list[Alternative]:
    """Every split that fits, for each kind of device alone, the fastest first."""
    rules = request_for(model, "").constraints
    hosts = [host for host in FreeDevices(inventory).hosts if not refusal(host, rules)]
    found: list[Alternative] = []
    for kind in sorted({host.kind for host in hosts}):
        of_kind = [host for host in hosts if host.kind == kind]
        cells = [len(cell) for host in of_kind for cell in host.cells.values()]
        largest = sum(cells) if rules.tp_span is TpSpan.ANY else max(cells, default=0)
        memory = min((size for host in of_kind for size in host.memory.values()), default=0)
        for tensor in (size for size in tensor_sizes(shape) if size <= largest):
            for pipeline in _stages(shape, sum(cells) // tensor):
                split = _alternative(model, shape, inventory, (tensor, pipeline), (kind, memory, sum(cells)))
                if split is not None:
                    found.append(split)
    return sorted(found, key=lambda split: (-split.rate, split.tensor * split.pipeline, split.tensor))[
        :MAX_ALTERNATIVES
    ]


def _stages(shape: ModelShape, groups: int) -> list[int]:
    """Stage counts worth listing: powers of two, and those that split the layers evenly, as far as devices reach."""
    most = min(shape.layers, groups, MAX_STAGES)
    return [n for n in range(1, most + 1) if n & (n - 1) == 0 or (shape.layers % n == 0 and n <= 8)]


def _alternative(
    model: ModelSpec,
    shape: ModelShape,
    inventory: Inventory,
    sizes: tuple[int, int],
    devices: tuple[str, int, int],
) -> Alternative | None:
    (tensor, pipeline), (kind, memory, total) = sizes, devices
    need = need_of(model, shape, tensor=tensor, pipeline=pipeline, cpu=kind == CPU_KIND)
    kv_tokens = need.kv_tokens(memory) if memory else 0
    if memory and need.device > memory:
        return None
    request = request_for(model, "")
    rules = replace(request.constraints, device_kinds=(kind,))
    replicas = _most_replicas(replace(request, tensor=tensor, pipeline=pipeline, data=1, constraints=rules), inventory)
    if not replicas:
        return None
    return Alternative(
        tensor=tensor,
        pipeline=pipeline,
        replicas=replicas,
        device_kind=kind,
        unused=total - replicas * tensor * pipeline,
        need_bytes=need.device,
        device_bytes=memory,
        kv_tokens=kv_tokens,
        rate=replicas * rate_of(shape, kind, tensor=tensor, pipeline=pipeline, kv_tokens=kv_tokens),
        chosen=(tensor, pipeline) == (model.parallel.tensor, model.parallel.pipeline),
    )


def _most_replicas(like: ReplicaRequest, inventory: Inventory) -> int:
    """How many such replicas an empty inventory holds: TP groups of a site, divided by the groups of a replica.

    That count is exact where replicas may stand together and no TP group leaves its node; else they are placed.
    """
    rules = like.constraints
    hosts = [host for host in FreeDevices(inventory).hosts if not refusal(host, rules)]
    if rules.separate is not Separate.NONE or rules.tp_span is TpSpan.ANY:
        most = min(sum(host.free for host in hosts) // like.width, MAX_TRIED)
        outcomes = place([replace(like, replica=str(number)) for number in range(most)], inventory)
        return sum(isinstance(outcome, Placement) for outcome in outcomes)
    groups: Counter[str] = Counter()
    for host in hosts:
        site = "" if rules.cross_site else host.node.site
        groups[site] += host.fits(like.tensor, rules.tp_span, like.device_memory_bytes)
    return sum(count // like.groups for count in groups.values())
