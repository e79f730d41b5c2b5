"""Writes what comes of every transcript's commands now: read the diff before it is committed."""

from __future__ import annotations

from tests.transcripts.kinds import KINDS, transcripts
from tests.transcripts.transcript import replay

for path in transcripts():
    text = replay(path, KINDS[path.parent.name]().run)
    if text != path.read_text():
        path.write_text(text)
        print(f"wrote {path}")
