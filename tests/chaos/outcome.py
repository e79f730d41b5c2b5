"""What a campaign counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Outcome:
    """Whatever does not apply to a campaign stays None and is left out of its account."""

    inputs: int = 0  # deliberate faults, hostile messages, or combinations tried
    requests: int = 0  # that clients sent
    lost: int = 0  # requests without an answer that should have had one, or tokens missing in it
    doubled: int = 0  # tokens or rows that came twice
    wrong: int = 0  # answers that differ from the undisturbed run, or doors that opened or stayed shut wrongly
    leaked: int = 0  # processes, slots, pages, counts, files left behind
    replicas_lost: int | None = None
    loop_lag_ms_p999: float | None = None
    rss_growth_ratio: float | None = None
    recovered_s_max: float | None = None
    simulated: bool = False  # no real process, or an engine that runs no model
    problems: list[str] = field(default_factory=list)  # the first few in words, for people

    def problem(self, text: str) -> None:
        if len(self.problems) < 20:
            self.problems.append(text)

    @property
    def clean(self) -> bool:
        """Nothing was lost, doubled, wrong or leaked."""
        return not (self.lost or self.doubled or self.wrong or self.leaked)

    def account(self) -> dict[str, Any]:
        """For the report: what was counted."""
        return {name: value for name, value in asdict(self).items() if value is not None and value != []}
