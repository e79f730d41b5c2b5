"""What a model's spec asks of placement."""

from __future__ import annotations

import pytest

from megatoken.cluster.decide.request import request_for
from megatoken.cluster.placement.values import Constraints
from megatoken.cluster.spec.model import ModelSpec


@pytest.mark.parametrize(("asked_gib", "need_bytes", "expected"), [(0, 0, 0), (0, 77, 77), (1.5, 77, 3 << 29)])
def test_the_memory_that_the_spec_says_counts_before_the_estimate(
    asked_gib: float, need_bytes: int, expected: int
) -> None:
    model = ModelSpec(name="m", engine="simulated", device_memory_gib=asked_gib)
    assert request_for(model, "m-1", need_bytes).device_memory_bytes == expected
    assert request_for(ModelSpec(name="m", engine="simulated"), "m-1").device_memory_bytes == 0


def test_shape_and_constraints_are_those_of_the_spec() -> None:
    model = ModelSpec.model_validate(
        {
            "name": "m",
            "engine": "simulated",
            "parallel": {"tensor": 4, "pipeline": 2},
            "placement": {"sites": ["oslo"], "node_selector": {"rack": "b", "disk": "nvme"}, "cross_site": True},
        }
    )
    asked = request_for(model, "m-7")
    assert (asked.replica, asked.model, asked.tensor, asked.pipeline, asked.data) == ("m-7", "m", 4, 2, 1)
    where = model.placement
    assert asked.constraints == Constraints(
        sites=("oslo",),
        labels=(("disk", "nvme"), ("rack", "b")),
        separate=where.separate,
        avoid=where.anti_affinity,
        tp_span=where.tensor_span,
        cross_site=True,
    )
