"""A logits processor for resumed requests: penalties that count the tokens generated before the resume.

vLLM counts a request's own output only, and takes what was generated elsewhere for prompt. Requests that resume.py
marked have vLLM's penalties switched off and get them here, by vLLM's own function, over the whole answer. Runs in
each rank, inside vLLM's sampler; a batch without such a request costs a truth test a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.sample.ops.penalties import apply_all_penalties

from megatoken.worker.engines.vllm.resume import resumed_count, resumed_penalties


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: torch.Tensor  # 1 x n: the prompt without what was generated before
    earlier: list[int]
    output: list[int]  # vLLM's own list, which grows
    penalties: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # presence, frequency, repetition


class ResumedPenalties(LogitsProcessor):  # type: ignore[misc]
    """Penalties of the batch's resumed requests, by row."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """Penalties change the best token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows requests as vLLM moves them between rows."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            self._rows.pop(index, None)
            penalties = resumed_penalties(params.extra_args)
            resumed = resumed_count(params.extra_args, len(prompt or ()))
            if penalties is not None and prompt is not None and resumed:
                self._rows[index] = self._row(prompt, output, resumed, penalties)
        for one, other, direction in batch_update.moved:
            moved, displaced = self._rows.pop(one, None), self._rows.pop(other, None)
            if moved is not None:
                self._rows[other] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                self._rows[one] = displaced

    def _row(self, prompt: list[int], output: list[int], resumed: int, penalties: tuple[float, float, float]) -> _Row:
        values = tuple(torch.tensor([value], dtype=torch.float32, device=self._device) for value in penalties)
        own = torch.tensor([prompt[:-resumed]], dtype=torch.int64, device=self._device)
        return _Row(own, prompt[-resumed:], output, values)  # type: ignore[arg-type]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Changes the marked rows in place."""
        for index, row in self._rows.items():
            presence, frequency, repetition = row.penalties
            logits[index : index + 1] = apply_all_penalties(
                logits[index : index + 1], row.prompt, presence, frequency, repetition, [row.earlier + row.output]
            )
        return logits
