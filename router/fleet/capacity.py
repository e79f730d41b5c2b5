"""How fast a replica is, measured from what it reports; nothing is configured.

A step of a continuous batch takes a fixed time plus a little per sequence, and a prompt token takes its own:

    busy time = a * steps + c * generated tokens + p * prompt tokens

a, c and p are fitted by least squares over differences of the worker's own totals, old ones fading with half-life
HALF_LIFE_S of busy time. Decode capacity is the rate at a full batch, b / (a + c b): measured at a light load it is
still about the full one, so a replica with few requests does not look slow and get fewer still. A weak prior (the
ridge) keeps what the data do not show near the last estimate of the replica's kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

HALF_LIFE_S: Final = 20.0
_RIDGE: Final = 1e-5
_MIN_BUSY_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds per step, per generated token, per prompt token."""

    step_s: float = 0.02
    token_s: float = 1e-5
    prompt_s: float = 1e-4

    def decode_tokens_per_s(self, batch: int) -> float:
        return batch / (self.step_s + self.token_s * batch)

    def prefill_tokens_per_s(self) -> float:
        return 1.0 / self.prompt_s

    def work_s(self, prompt_tokens: int, tokens: int, batch: int) -> float:
        """A request's share of the replica's time in a full batch."""
        return prompt_tokens * self.prompt_s + tokens * (self.step_s / batch + self.token_s)


@dataclass(slots=True)
class Capacity:
    """The estimator of one replica. `batch` is the size of its full batch."""

    batch: int
    prior: Rates = Rates()
    rates: Rates = Rates()
    decode_tokens_per_s: float = 0.0  # at a full batch
    prefill_tokens_per_s: float = 0.0
    measured: bool = False
    _normal: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, 3)))
    _moment: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))

    def __post_init__(self) -> None:
        # Knowing nothing: a full batch takes a step twice as long as an empty one.
        self.prior = Rates(token_s=Rates().step_s / self.batch)
        self._set(self.prior)

    def adopt(self, prior: Rates) -> None:
        """Starts from what others of its kind showed, as long as nothing of its own was measured."""
        if not self.measured:
            self.prior = prior
            self._set(prior)

    def observe(self, busy_s: float, generated: int, prompt: int, running: float) -> None:
        """Differences of a worker's totals between two reports, and the mean batch between them."""
        if busy_s < _MIN_BUSY_S or generated <= 0:
            return
        row = np.array([generated / max(running, 1.0), float(generated), float(prompt)])
        fade = 0.5 ** (busy_s / HALF_LIFE_S)
        # Relative errors count, not absolute ones: a long interval is no more certain per second than a short one.
        weight = 1.0 / busy_s
        self._normal = self._normal * fade + weight * np.outer(row, row)
        self._moment = self._moment * fade + weight * busy_s * row
        self.measured = True
        self._fit()

    def _fit(self) -> None:
        prior = np.array([self.prior.step_s, self.prior.token_s, self.prior.prompt_s])
        # Unknowns are scaled by the prior so that one ridge suits all three.
        normal = self._normal * np.outer(prior, prior)
        moment = self._moment * prior
        ridge = _RIDGE * max(float(np.trace(normal)) / 3, 1e-12)
        solution = np.linalg.solve(normal + ridge * np.eye(3), moment + ridge * np.ones(3))
        step_s, token_s, prompt_s = (np.clip(solution, 1e-3, 1e3) * prior).tolist()
        self._set(Rates(step_s, token_s, prompt_s))

    def _set(self, rates: Rates) -> None:
        self.rates = rates
        self.decode_tokens_per_s = rates.decode_tokens_per_s(self.batch)
        self.prefill_tokens_per_s = rates.prefill_tokens_per_s()
