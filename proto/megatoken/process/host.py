"""What a node is known by also after its Ray was started again, under another id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

HOST_LABEL: Final = "megatoken-host"  # of a Ray node whose supervisor starts Ray again: the same before and after


def host_of(node_id: str, labels: Mapping[str, str]) -> str:
    """The label's value; the id where nobody starts Ray again."""
    return labels.get(HOST_LABEL, node_id)
