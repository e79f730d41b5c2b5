"""Placements for people. Pure."""

from __future__ import annotations

from megatoken.cluster.inventory.topology import Inventory
from megatoken.cluster.placement.place import Rank


def rank_text(rank: Rank, inventory: Inventory) -> str:
    """A rank for people: "rank 0: node-a device 0"."""
    node = inventory.node(rank.node)
    return f"rank {rank.rank}: {node.title if node else rank.node} device {rank.device}"
