"""Which accelerators a process may use, where its surroundings have narrowed them. Pure.

A plan counts a node's devices from 0, as Ray does. Where a batch system or an operator gave the node's Ray a part of
the machine (CUDA_VISIBLE_DEVICES=4,5,6,7), device 0 of the plan is the first of that list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

VISIBILITY: Final = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")  # NVIDIA and AMD; drivers read their own


def visible_devices(environ: Mapping[str, str], devices: Sequence[int]) -> list[str]:
    """What the driver calls these devices of the node: numbers, or ids where the surroundings gave ids.

    Raises ValueError for one that the surroundings do not have.
    """
    given = next((environ[name] for name in VISIBILITY if environ.get(name)), "")
    if not given:
        return [str(device) for device in devices]
    names = [name.strip() for name in given.split(",")]
    missing = [device for device in devices if device >= len(names)]
    if missing:
        raise ValueError(f"device {missing[0]} is not allowed: this node's Ray was given {given!r}")
    return [names[device] for device in devices]


def visibility(environ: Mapping[str, str], devices: Sequence[int]) -> dict[str, str]:
    """The variables that let a process use these devices of the node, in this order, and no others."""
    return dict.fromkeys(VISIBILITY, ",".join(visible_devices(environ, devices)))
