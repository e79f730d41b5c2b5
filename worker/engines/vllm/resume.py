"""What a resumed request needs so that it continues as if it had never moved, and what cannot be carried over.

The tokens that were generated elsewhere stand at the end of the prompt. So the KV cache, greedy choices and the
repetition penalty (which counts prompt and output alike) are right by themselves. Two things are put right here,
each in the process where vLLM keeps it: the grammar of a structured output reads those tokens first (`install`, in
the engine core), and penalties on generated tokens count them too (resumed_penalties.py, in the ranks). What
stays different is said in `resume_note`. Called by engine.py for each request, and by plugins.py in each
engine core.
"""

from __future__ import annotations

from typing import Any, Final

from vllm.sampling_params import SamplingParams
from vllm.v1.structured_output import StructuredOutputManager

from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines.engine import EngineRequest
from megatoken.worker.engines.requests import RESERVED

RESUMED_KEY: Final = "megatoken_resumed_tokens"  # in SamplingParams.extra_args: how many prompt tokens were generated
PENALTIES_KEY: Final = "megatoken_penalties"  # presence, frequency, repetition
LARGEST_PENALTY: Final = 3.4e38  # what a rank's 32-bit floats hold; requests are held to less than that before
PENALTIES_PROCESSOR: Final = "megatoken.worker.engines.vllm.resumed_penalties:ResumedPenalties"

SEEDED_NOTE: Final = "seeded sampling restarted its random numbers at the resume"
PENALTY_NOTE: Final = "presence and frequency penalties count only the tokens since the resume"
REASONING_NOTE: Final = "the structured output's grammar restarted at the resume"
BAD_WORDS_NOTE: Final = "a bad word of several tokens may span the resume"


def penalties_carry_over(config: WorkerConfig) -> bool:
    """Whether ranks can run our logits processor: vLLM's CPU model runner takes it, speculative decoding does not."""
    return config.device_kind == "cpu" and "speculative_config" not in config.engine_args


def carry_over(request: EngineRequest, params: SamplingParams, config: WorkerConfig) -> None:
    """Prepares the parameters of a resumed request and sets its note; takes names of ours from any other request."""
    if params.extra_args:
        params.extra_args = {name: value for name, value in params.extra_args.items() if not name.startswith(RESERVED)}
    if not request.resumed_tokens:
        return
    notes = []
    extra: dict[str, Any] = {RESUMED_KEY: request.resumed_tokens}
    if params.seed is not None and params.temperature > 0:
        notes.append(SEEDED_NOTE)
    if params.presence_penalty or params.frequency_penalty:
        if penalties_carry_over(config):
            extra[PENALTIES_KEY] = [params.presence_penalty, params.frequency_penalty, params.repetition_penalty]
            params.presence_penalty, params.frequency_penalty, params.repetition_penalty = 0.0, 0.0, 1.0
        else:
            notes.append(PENALTY_NOTE)
    if params.structured_outputs is not None and "reasoning_parser" in config.engine_args:
        notes.append(REASONING_NOTE)
    if params.bad_words:
        notes.append(BAD_WORDS_NOTE)
    params.extra_args = {**(params.extra_args or {}), **extra}
    request.resume_note = "; ".join(notes)


def resumed_count(extra_args: dict[str, Any] | None, prompt_tokens: int) -> int:
    """How many tokens at the prompt's end were generated before; 0 for what is no such count.

    Where this runs an exception ends the engine, and with it everybody's requests: so it believes nothing.
    """
    count = (extra_args or {}).get(RESUMED_KEY)
    return count if type(count) is int and 0 < count < prompt_tokens else 0


def resumed_penalties(extra_args: dict[str, Any] | None) -> tuple[float, float, float] | None:
    """Presence, frequency and repetition penalty of a marked request; None for what is no such thing."""
    values = (extra_args or {}).get(PENALTIES_KEY)
    if not isinstance(values, list | tuple) or len(values) != 3:
        return None
    if not all(type(value) in (int, float) and abs(value) <= LARGEST_PENALTY for value in values):  # NaN fails it too
        return None
    presence, frequency, repetition = values
    return (float(presence), float(frequency), float(repetition)) if repetition > 0 else None


def install() -> None:
    """Has vLLM's grammars read a resumed request's earlier tokens. For the engine core; changes nothing for others."""
    original = StructuredOutputManager._create_grammar
    if getattr(original, "reads_resumed_tokens", False):
        return

    def create_grammar(self: Any, request: Any) -> Any:
        grammar = original(self, request)
        resumed = resumed_count(request.sampling_params.extra_args, len(request.prompt_token_ids or ()))
        if resumed and self.reasoner_cls is None:
            earlier = list(request.prompt_token_ids[-resumed:])
            if not grammar.accept_tokens(request.request_id, earlier):
                raise ValueError(f"the {resumed} tokens generated before the resume do not match the structured output")
        return grammar

    create_grammar.reads_resumed_tokens = True  # type: ignore[attr-defined]
    StructuredOutputManager._create_grammar = create_grammar
