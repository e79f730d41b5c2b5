"""Weaves direct writes into vLLM's streams: vLLM makes the first chunks and the last, the edge writes those between.

A Generation stands where AsyncLLM.generate's generator would. While vLLM's stream generator waits in it for more
output, and all before was sent, tokens may go to the client directly. When vLLM is given output again, it is told of
the tokens that it did not see, so that its usage adds up. A request that wants anything but text in its chunks is left
alone.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM

from megatoken.router.edge.http.exchange import EXCHANGE, Exchange
from megatoken.router.edge.router_session.direct import DirectWriter, learn
from megatoken.router.edge.vllm.engine_core import GENERATION, CoreReceiver

Chunks = AsyncIterator[str]


class Generation(AsyncIterator[RequestOutput]):
    """One call of AsyncLLM.generate; the same outputs, fewer of them once `writer` is set."""

    def __init__(self, llm: EdgeLLM, outputs: AsyncGenerator[RequestOutput, None], params: Any) -> None:
        self._llm = llm
        self._outputs = outputs
        self._started = False
        self.params = params
        self.receivers: list[CoreReceiver] = []
        self.writer: DirectWriter | None = None

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._started:
            self._started = True
            token = GENERATION.set(self)
            try:
                return await anext(self._outputs)
            finally:
                GENERATION.reset(token)
        if self.writer is None:
            return await anext(self._outputs)
        receiver = self.receivers[0]
        state = self._llm.output_processor.request_states.get(receiver.request_id)
        if state is not None:
            receiver.write_from_now_on(self.writer, state)
        output = await anext(self._outputs)
        if receiver.written:
            output.outputs[0].token_ids = receiver.take_written(output.outputs[0].token_ids)
        return output

    async def aclose(self) -> None:
        await self._outputs.aclose()


class EdgeLLM(AsyncLLM):
    """AsyncLLM whose generations the edge knows by their HTTP exchange."""

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Generation:
        generation = Generation(self, super().generate(prompt, sampling_params, *args, **kwargs), sampling_params)
        exchange = EXCHANGE.get()
        if exchange is not None:
            exchange.generations.append(generation)
        return generation


def with_direct_writes(original: Callable[..., Chunks], serving: Any) -> Callable[..., Chunks]:
    """A stream generator of vLLM's serving layer, with direct writes for the requests that allow them."""

    async def written(request: Any, *args: Any, **kwargs: Any) -> Chunks:
        exchange = EXCHANGE.get()
        chunks = original(request, *args, **kwargs)
        generation = only_text(request, serving, exchange)
        sent = 0
        async for chunk in chunks:
            sent += 1
            if generation is not None and exchange is not None:
                yield chunk
                if generation.writer is None:
                    template = learn(chunk)
                    # Only when what was yielded has really gone out, and nothing on the way holds it back.
                    if template is not None and exchange.guard.bodies == sent:
                        generation.writer = exchange.writer(template)
                    elif sent > 2:
                        generation = None
            else:
                yield chunk

    return written


def only_text(request: Any, serving: Any, exchange: Exchange | None) -> Generation | None:
    """The one generation of a request whose middle chunks hold nothing but text; None for any other."""
    if exchange is None or len(exchange.generations) != 1:
        return None
    if getattr(serving, "parser_cls", None) is not None or getattr(serving, "enable_log_outputs", False):
        return None
    if request.use_beam_search or request.return_token_ids or request.logprobs or getattr(request, "echo", False):
        return None
    if serving.enable_force_include_usage or (request.stream_options and request.stream_options.continuous_usage_stats):
        return None
    generation: Generation = exchange.generations[0]
    params = generation.params
    if params.n != 1 or params.logprobs is not None or not params.detokenize or (params.stream_interval or 1) > 1:
        return None
    return generation


def weave_app(state: Any, args: Any) -> None:
    """Weaves direct writes into an app's chat and text completions. Leaves it alone where something rewrites bodies."""
    if args.middleware or getattr(args, "sse_keep_alive_interval", 0):
        return
    chat, completion = state.openai_serving_chat, state.openai_serving_completion
    chat.chat_completion_stream_generator = with_direct_writes(chat.chat_completion_stream_generator, chat)
    completion.completion_stream_generator = with_direct_writes(completion.completion_stream_generator, completion)
