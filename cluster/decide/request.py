"""A model's spec as a request for a place. Pure; the reconciler and `megatoken plan` call it."""

from __future__ import annotations

from megatoken.cluster.placement.values import Constraints, ReplicaRequest
from megatoken.cluster.spec.model import ModelSpec

GIB = 1 << 30


def request_for(model: ModelSpec, replica: str, need_bytes: int = 0) -> ReplicaRequest:
    """What one replica of `model` asks of placement; `need_bytes` of device memory where the spec says none."""
    where = model.placement
    return ReplicaRequest(
        replica=replica,
        model=model.name,
        tensor=model.parallel.tensor,
        pipeline=model.parallel.pipeline,
        data=model.parallel.data,
        device_memory_bytes=int(model.device_memory_gib * GIB) or need_bytes,
        constraints=Constraints(
            device_kinds=where.device_kinds,
            sites=where.sites,
            nodes=where.nodes,
            labels=tuple(sorted(where.node_selector.items())),
            separate=where.separate,
            avoid=where.anti_affinity,
            tp_span=where.tensor_span,
            cross_site=where.cross_site,
        ),
    )
