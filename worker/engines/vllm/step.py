"""Turns one EngineCoreOutputs into one Step: the only Python that runs once a token. Called by engine.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import grpc
import numpy as np
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from megatoken.tokens.frames import EMPTY, U32
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.engines.engine import Ended, EngineLoad, EngineStep, Prefilled

REASONS: Final[dict[Any, int]] = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.REPETITION: pb.FINISH_REASON_REPETITION,
}
INVALID_ARGUMENT: Final[int] = grpc.StatusCode.INVALID_ARGUMENT.value[0]
UNAVAILABLE: Final[int] = grpc.StatusCode.UNAVAILABLE.value[0]


class StepReader:
    """Knows which engine-core request is which slot."""

    def __init__(self, load: EngineLoad) -> None:
        self._load = load
        self._slots: dict[str, int] = {}
        self._identities: dict[int, str] = {}

    def watch(self, identity: str, slot: int) -> None:
        """A request was sent."""
        self._slots[identity] = slot
        self._identities[slot] = identity

    def forget(self, slots: Sequence[int]) -> list[str]:
        """Requests were aborted; returns the identities of those that ran."""
        identities = [self._identities.pop(slot) for slot in slots if slot in self._identities]
        for identity in identities:
            del self._slots[identity]
        return identities

    def lose(self, identity: str, message: str, code: int) -> EngineStep | None:
        """A request never reached the engine core: the step that ends it, or None when nobody waits for it any more."""
        slot = self._slots.get(identity)
        if slot is None:
            return None
        self.forget((slot,))
        return EngineStep(EMPTY, EMPTY, ended=[Ended(slot, pb.FINISH_REASON_ERROR, code=code, message=message)])

    def read(self, outputs: EngineCoreOutputs) -> EngineStep | None:
        """The step, also when nobody waits for what it made; None when it made nothing."""
        if outputs.scheduler_stats is not None:
            self._read_stats(outputs.scheduler_stats)
        slots: list[int] = []
        tokens: list[int] = []
        counts: list[int] = []
        step = EngineStep(EMPTY, EMPTY, prefilled=[], ended=[], details=[])
        find = self._slots.get
        made_before = self._load.made_tokens
        for output in outputs.outputs:
            slot = find(output.request_id)
            made = output.new_token_ids
            self._load.made_tokens += len(made)
            if slot is None:
                self._load.unwanted_tokens += len(made)
                continue
            if made:
                slots.append(slot)
                tokens += made
                counts.append(len(made))
            # Most outputs carry tokens and nothing else; the rest is looked at only where something is set.
            if (
                output.finish_reason is not None
                or output.prefill_stats is not None
                or output.new_logprobs is not None
                or output.new_prompt_logprobs_tensors is not None
            ):
                self._read_rest(step, slot, output)
        if self._load.made_tokens == made_before and not step.ended and not step.details:
            return None
        step.slot, step.token = np.array(slots, U32), np.array(tokens, U32)
        if len(tokens) != len(slots):
            step.count = np.array(counts, U32)
        return step

    def _read_rest(self, step: Any, slot: int, output: EngineCoreOutput) -> None:
        stats = output.prefill_stats
        if stats is not None:
            scheduled_s = next(
                (event.timestamp for event in output.events or () if event.type == EngineCoreEventType.SCHEDULED), None
            )
            step.prefilled.append(Prefilled(slot, stats.num_prompt_tokens, stats.num_cached_tokens, scheduled_s))
        if output.new_logprobs is not None or output.new_prompt_logprobs_tensors is not None:
            detail = pb.Detail()
            if output.new_logprobs is not None:
                detail.logprobs.CopyFrom(_logprobs(output.new_logprobs))
            if output.new_prompt_logprobs_tensors is not None:
                detail.prompt_logprobs.CopyFrom(_logprobs(_as_arrays(output.new_prompt_logprobs_tensors)))
            step.details.append((slot, detail))
        if output.finish_reason is not None:
            step.ended.append(_ended(slot, output))
            self.forget((slot,))

    def _read_stats(self, stats: Any) -> None:
        load = self._load
        load.running, load.waiting = stats.num_running_reqs, stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
        load.kv_usage = stats.kv_cache_usage
        load.prefix_queries += stats.prefix_cache_stats.queries
        load.prefix_hits += stats.prefix_cache_stats.hits
        load.steps += 1


def _ended(slot: int, output: EngineCoreOutput) -> Ended:
    reason = REASONS.get(output.finish_reason)
    if reason is None:  # the engine gave the request up by itself: another replica may serve it
        message = f"the engine ended the request: {output.finish_reason}"
        return Ended(slot, pb.FINISH_REASON_ERROR, code=UNAVAILABLE, message=message)
    stop = output.stop_reason if reason == pb.FINISH_REASON_STOP and isinstance(output.stop_reason, int) else None
    return Ended(slot, reason, stop_token=stop)


def _logprobs(lists: LogprobsLists) -> pb.Logprobs:
    """Rows of the sampled token first, then the alternatives."""
    token = np.asarray(lists.logprob_token_ids)
    return pb.Logprobs(
        width=token.shape[1],
        token=token.astype(np.int64).ravel().tolist(),
        logprob=np.asarray(lists.logprobs, np.float32).ravel().tolist(),
        rank=np.asarray(lists.sampled_token_ranks).astype(np.int64).ravel().tolist(),
    )


def _as_arrays(tensors: LogprobsTensors) -> LogprobsLists:
    return LogprobsLists(
        tensors.logprob_token_ids.numpy(), tensors.logprobs.numpy(), tensors.selected_token_ranks.numpy()
    )
