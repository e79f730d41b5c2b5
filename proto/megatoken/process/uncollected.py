"""Imports without garbage collections.

A program that imports vLLM makes about a million objects, none of them garbage, and Python looks through them again
and again as they come: an eighth to a quarter of the time that the import takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """What is made meanwhile is not looked through, then or later: it is there to stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
