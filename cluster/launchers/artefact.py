"""One file that `megatoken render` writes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Artefact:
    """`name` is relative to the output directory."""

    name: str
    text: str
    executable: bool = False
