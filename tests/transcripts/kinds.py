"""Which interpreter reads which folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tests.transcripts.epochs import EpochsScript
from tests.transcripts.reconciler import ReconcilerScript
from tests.transcripts.router import RouterScript
from tests.transcripts.transcript import Command


class Script(Protocol):
    """One transcript's world."""

    def run(self, command: Command) -> list[str]: ...


KINDS: dict[str, Callable[[], Script]] = {
    "reconciler": ReconcilerScript,
    "router": RouterScript,
    "epochs": EpochsScript,
}


def transcripts() -> list[Path]:
    """Every transcript there is."""
    return sorted(path for kind in KINDS for path in (Path(__file__).parent / kind).glob("*.txt"))
