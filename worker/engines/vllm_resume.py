"""What a resumed request needs so that it continues as if it had never moved, and what cannot be carried over.

The tokens that were generated elsewhere come at the end of the prompt, so the KV cache, greedy choices and the
repetition penalty (which counts prompt and output alike) are right by themselves. Called by vllm_engine.py for each
request.
"""

from __future__ import annotations

from vllm.sampling_params import SamplingParams

from worker.engines.engine import EngineRequest

SEEDED_NOTE = "seeded sampling restarted its random numbers at the resume"
PENALTY_NOTE = "presence and frequency penalties count only the tokens since the resume"
STRUCTURED_NOTE = "the structured output's grammar restarted at the resume"


def carry_over(request: EngineRequest, params: SamplingParams) -> None:
    """Sets the request's resume note; leaves a request that was not resumed alone."""
    if not request.resumed_tokens:
        return
    notes = []
    if params.seed is not None and params.temperature > 0:
        notes.append(SEEDED_NOTE)
    if params.presence_penalty or params.frequency_penalty:
        notes.append(PENALTY_NOTE)
    if params.structured_outputs is not None:
        notes.append(STRUCTURED_NOTE)
    request.resume_note = "; ".join(notes)
