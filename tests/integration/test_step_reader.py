"""What an engine core hands over, and what of it still has somebody who waits."""

from __future__ import annotations

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from megatoken.worker.engines.engine import EngineLoad
from megatoken.worker.engines.vllm.step import StepReader

pytestmark = pytest.mark.vllm


def test_tokens_of_a_request_that_was_given_up_are_passed_over_and_still_counted() -> None:
    load = EngineLoad()
    reader = StepReader(load)
    for slot, identity in enumerate(("kept", "dropped")):
        reader.watch(identity, slot)
    assert reader.forget((1,)) == ["dropped"]
    outputs = [
        EngineCoreOutput(request_id="kept", new_token_ids=[5, 6], finish_reason=FinishReason.LENGTH),
        EngineCoreOutput(request_id="dropped", new_token_ids=[7]),
    ]
    step = reader.read(EngineCoreOutputs(outputs=outputs))
    assert step is not None
    assert step.token.tolist() == [5, 6]
    assert [ended.slot for ended in step.ended] == [0]
    assert (load.made_tokens, load.unwanted_tokens) == (3, 1)
    step = reader.read(EngineCoreOutputs(outputs=[EngineCoreOutput(request_id="kept", new_token_ids=[8])]))
    assert step is not None, "the account is brought up to date by a step"
    assert len(step.slot) == len(step.token) == 0
    assert (load.made_tokens, load.unwanted_tokens) == (4, 2)
    assert reader.read(EngineCoreOutputs(outputs=[])) is None
