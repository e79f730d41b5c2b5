"""The simulated batch: seeded tokens that depend on every token before, whole limits, priorities and removal."""

from __future__ import annotations

import numpy as np
import pytest

from megatoken.tokens.frames import U32
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.config import SimulatedConfig
from megatoken.worker.engines.engine import EngineRequest
from megatoken.worker.engines.simulated.batch import SimulatedBatch


def request(prompt, slots=(0,), max_tokens=8, priority=0, resumed=0, **sampling) -> EngineRequest:
    return EngineRequest(
        "r",
        np.array(prompt, U32),
        pb.SamplingParams(**sampling),
        max_tokens,
        choices=len(slots),
        priority=priority,
        resumed_tokens=resumed,
        slots=tuple(slots),
    )


def generate(batch: SimulatedBatch, steps: int = 1000) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for _ in range(steps):
        batch.admit()
        if not batch.running:
            break
        step = batch.step()
        for slot, token in zip(step.slot.tolist(), step.token.tolist(), strict=True):
            tokens.setdefault(slot, []).append(token)
    return tokens


def batch(**settings) -> SimulatedBatch:
    config = SimulatedConfig(**settings)
    return SimulatedBatch(config, config.vocab_size)


def test_a_resumed_request_continues_with_the_tokens_of_an_undisturbed_run() -> None:
    whole = batch()
    whole.add(request([5, 6, 7], max_tokens=20))
    undisturbed = generate(whole)[0]
    for moved_at in (1, 7, 19):
        other = batch()
        other.add(request([5, 6, 7, *undisturbed[:moved_at]], max_tokens=20 - moved_at, resumed=moved_at))
        assert generate(other)[0] == undisturbed[moved_at:]


def test_tokens_depend_on_the_whole_prompt_and_on_the_seed() -> None:
    def tokens(prompt: list[int], seed: int = 0) -> tuple[int, ...]:
        one = batch(seed=seed)
        one.add(request(prompt))
        return tuple(generate(one)[0])

    seen = {tokens([5, 6, 7]), tokens([6, 5, 7]), tokens([5, 6]), tokens([0, 5, 6, 7]), tokens([5, 6, 7], seed=1)}
    assert len(seen) == 5
    assert tokens([5, 6, 7]) == tokens([5, 6, 7])


def test_neighbours_in_the_batch_change_nothing() -> None:
    alone = batch()
    alone.add(request([9, 9], slots=(4,)))
    crowded = batch()
    for slot in range(6):
        crowded.add(request([9, 9] if slot == 4 else [slot + 3], slots=(slot,), max_tokens=3 + slot * 2))
    assert generate(crowded)[4][:8] == generate(alone)[4]


def test_choices_differ_unless_greedy_and_follow_the_seed() -> None:
    def choices(**sampling) -> dict[int, list[int]]:
        one = batch()
        one.add(request([5], slots=(0, 1, 2), **sampling))
        return generate(one)

    first = choices(temperature=1.0, seed=7)
    assert len({tuple(tokens) for tokens in first.values()}) == 3
    assert first == choices(temperature=1.0, seed=7)
    assert first != choices(temperature=1.0, seed=8)


def test_limits_stop_tokens_and_end_of_sequence() -> None:
    one = batch()
    one.add(request([5], max_tokens=4))
    tokens = generate(one)[0]
    assert len(tokens) == 4

    stopping = batch()
    stopping.add(request([5], max_tokens=4, stop_token_ids=[tokens[1]]))
    stopping.admit()
    stopping.step()
    step = stopping.step()
    assert step.ended[0].reason == pb.FINISH_REASON_STOP
    assert step.ended[0].stop_token == tokens[1]
    assert stopping.running == 0

    ending = batch(eos_every=1)
    ending.add(request([5], max_tokens=9, min_tokens=3))
    assert generate(ending)[0][3:] == [2]
    ignoring = batch(eos_every=1)
    ignoring.add(request([5], max_tokens=9, ignore_eos=True))
    assert len(generate(ignoring)[0]) == 9


def test_places_and_priorities() -> None:
    one = batch(max_running=2)
    for slot, priority in enumerate((0, 0, 5, -1)):
        one.add(request([3], slots=(slot,), max_tokens=1, priority=priority))
    one.admit()
    assert (one.running, one.waiting) == (2, 2)
    assert one.step().slot.tolist() == [3, 0]
    one.admit()
    assert one.step().slot.tolist() == [1, 2]


def test_a_full_cache_holds_requests_back_but_never_an_empty_batch() -> None:
    one = batch(kv_cache_tokens=16, prefill_chunk_tokens=16)
    for slot in range(3):
        one.add(request([3] * 12, slots=(slot,), max_tokens=2))
    one.admit()
    assert one.running == 1
    assert 0.7 < one.kv_usage < 0.8
    assert len(generate(one)) == 3


def test_removal_from_queue_and_batch() -> None:
    one = batch(max_running=2)
    for slot in range(4):
        one.add(request([slot + 3], slots=(slot,)))
    one.admit()
    one.remove([0, 3])
    assert (one.running, one.waiting) == (1, 1)
    assert set(generate(one)) == {1, 2}


@pytest.mark.parametrize("wanted", [0, 2])
def test_logprobs_have_the_token_itself_first(wanted: int) -> None:
    one = batch()
    one.add(request([3], max_tokens=1, logprobs=wanted))
    one.admit()
    step = one.step()
    [(slot, detail)] = step.details
    assert slot == 0
    assert detail.logprobs.width == wanted + 1
    assert detail.logprobs.token[0] == step.token[0]
