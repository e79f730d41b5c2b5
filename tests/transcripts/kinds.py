"""Which interpreter reads which folder."""

from __future__ import annotations

from pathlib import Path

from tests.transcripts.epochs import EpochsScript
from tests.transcripts.reconciler import ReconcilerScript
from tests.transcripts.router import RouterScript

KINDS = {"reconciler": ReconcilerScript, "router": RouterScript, "epochs": EpochsScript}


def transcripts() -> list[Path]:
    """Every transcript there is."""
    return sorted(path for kind in KINDS for path in (Path(__file__).parent / kind).glob("*.txt"))
