"""What this router took over from workers and gave to clients: monotonic totals, in the shared counter file if any.

`generated_tokens` counts every token that came from a worker for a request of ours, so that it equals what the
workers state at rest; `prompt_tokens` counts a prompt when its first token came.
"""

from __future__ import annotations

from megatoken.counters import INDEX, NAMES, CounterWriter


class RouterLedger:
    """Totals by name; a CounterWriter makes them readable to the node's throughput agent."""

    def __init__(self, writer: CounterWriter | None = None) -> None:
        self._totals = writer.totals if writer is not None else memoryview(bytearray(8 * len(NAMES))).cast("q")
        self.refused = 0
        self.resumes = 0
        self.delivered_tokens = 0  # to clients, each once
        self.connection_faults = 0  # of our own, on the way to a worker; a worker that is away is none
        self.foreign_tokens = 0  # came for streams that their worker does not have

    def __getitem__(self, name: str) -> int:
        return self._totals[INDEX[name]]

    def add(self, name: str, amount: int = 1) -> None:
        self._totals[INDEX[name]] += amount
