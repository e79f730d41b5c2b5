"""`megatoken generate PROMPT`: one request through the router, over gRPC, streaming."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc

from megatoken.cluster.cli.common import add_cluster_arguments, chosen
from megatoken.cluster.client.control import CommandError, client_of, open_sync_channel
from megatoken.cluster.planning.check import source_directory
from megatoken.v1 import control_pb2, tokens_pb2, tokens_pb2_grpc

API_KEY_VARIABLE = "MEGATOKEN_API_KEY"
FINISHES = {
    tokens_pb2.FINISH_REASON_STOP: "stop",
    tokens_pb2.FINISH_REASON_LENGTH: "length",
    tokens_pb2.FINISH_REASON_CANCELLED: "cancelled",
    tokens_pb2.FINISH_REASON_ERROR: "error",
    tokens_pb2.FINISH_REASON_REPETITION: "repetition",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument("prompt", nargs="?", help="the user's message; none: --tokens, or standard input")
    parser.add_argument("--model", help="its name; not needed while there is only one")
    parser.add_argument("--router", metavar="HOST:PORT", help="a router; default: the first that serves")
    parser.add_argument("--tokenizer", metavar="DIR", help="directory of the tokenizer; default: the model's source")
    parser.add_argument("--raw", action="store_true", help="send the prompt as it is, without the chat template")
    parser.add_argument("--tokens", metavar="ID,ID", help="token ids as the prompt; answers are token ids too")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS")


def run(arguments: argparse.Namespace) -> int:
    record = chosen(arguments)
    with client_of(record) as client:
        status = client.status()
    sources = {entry.model: entry.source for entry in status.models}
    model = _model(arguments.model, status)
    router = arguments.router or _router(status)
    tokenizer = None if arguments.tokens else load_tokenizer(arguments.tokenizer, sources.get(model, ""))
    request = build_request(arguments, model, tokenizer)
    began = time.monotonic()
    with open_sync_channel(router, record.tls) as channel:
        replies = tokens_pb2_grpc.TokensStub(channel).Generate(
            request, timeout=arguments.timeout, metadata=_key_metadata()
        )
        try:
            finish, first_s = show(replies, tokenizer, began)
        except grpc.RpcError as error:
            wrong = error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
            raise CommandError(f"{error.code().name}: {error.details()}", 2 if wrong else 1) from None
    _summary(finish, time.monotonic() - began, first_s)
    return 0 if finish.reason != tokens_pb2.FINISH_REASON_ERROR else 1


def build_request(arguments: argparse.Namespace, model: str, tokenizer: Tokenizer | None) -> tokens_pb2.GenerateRequest:
    """The request that the arguments describe. Raises CommandError for token ids that are none."""
    if tokenizer is None:
        try:
            prompt = [int(part) for part in arguments.tokens.split(",") if part.strip()]
            if any(not 0 <= token < 2**32 for token in prompt):
                raise ValueError
        except ValueError:
            raise CommandError(
                f"--tokens: {arguments.tokens!r} is not allowed; numbers with commas: 1,2,3", 2
            ) from None
    else:
        text = arguments.prompt if arguments.prompt is not None else sys.stdin.read()
        prompt = tokenizer.encode(text, raw=arguments.raw)
    sampling = tokens_pb2.SamplingParams(temperature=arguments.temperature, ignore_eos=arguments.ignore_eos)
    if not 1 <= arguments.max_tokens < 2**31:
        raise CommandError(f"--max-tokens: {arguments.max_tokens} is not allowed; at least 1", 2)
    sampling.max_tokens = arguments.max_tokens
    if arguments.seed is not None:
        sampling.seed = arguments.seed
    return tokens_pb2.GenerateRequest(model=model, prompt=prompt, sampling=sampling)


def show(
    replies: Iterable[tokens_pb2.GenerateResponse], tokenizer: Tokenizer | None, began: float
) -> tuple[tokens_pb2.Finish, float]:
    """Prints what arrives as it arrives; returns how it ended and the seconds to the first token."""
    tokens: list[int] = []
    shown, first_s, finish = "", 0.0, tokens_pb2.Finish()
    for reply in replies:
        if reply.tokens and not tokens:
            first_s = time.monotonic() - began
        tokens += reply.tokens
        if tokenizer is None:
            print(*reply.tokens, end=" " if reply.tokens else "", flush=True)
        else:
            text = tokenizer.decode(tokens)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: the rest is on its way
                print(text[len(shown) :], end="", flush=True)
                shown = text
        if reply.HasField("finish"):
            finish = reply.finish
    print(flush=True)
    return finish, first_s


class Tokenizer:
    """A model's tokenizer and chat template, without loading an engine."""

    def __init__(self, directory: Path) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._settings: dict[str, Any] = {}
        config = directory / "tokenizer_config.json"
        if config.is_file():
            self._settings = json.loads(config.read_text())
        template = directory / "chat_template.jinja"
        self._template = template.read_text() if template.is_file() else self._settings.get("chat_template")

    def encode(self, text: str, *, raw: bool) -> list[int]:
        """Token ids of a prompt, or of one user message through the chat template."""
        if raw or not isinstance(self._template, str):
            return list(self._tokenizer.encode(text).ids)
        return list(self._tokenizer.encode(self._chat(text), add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _chat(self, text: str) -> str:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in self._settings.items()
            if name.endswith("_token") and value is not None
        }
        messages = [{"role": "user", "content": text}]
        return environment.from_string(str(self._template)).render(
            messages=messages, add_generation_prompt=True, **special
        )


def load_tokenizer(asked: str | None, source: str) -> Tokenizer:
    """The tokenizer in the asked directory or the model's source. Raises CommandError."""
    directory = Path(asked) if asked else source_directory(source)
    if directory is None or not (directory / "tokenizer.json").is_file():
        where = f" in {directory}" if directory else ""
        raise CommandError(f"--tokenizer: no tokenizer.json{where}; name its directory, or give --tokens", 2)
    return Tokenizer(directory)


def _model(asked: str | None, status: control_pb2.ClusterStatus) -> str:
    names = [model.model for model in status.models]
    if asked is not None:
        return asked  # the router says what there is, as it would to any client
    if len(names) != 1:
        raise CommandError(f"--model: is missing; one of: {', '.join(names) or 'none'}", 2)
    return names[0]


def _router(status: control_pb2.ClusterStatus) -> str:
    found = next((entry.address for entry in status.processes if entry.kind == "router" and entry.address), None)
    if found is None:
        raise CommandError("no router serves yet; see `megatoken status`")
    return found


def _key_metadata() -> list[tuple[str, str]]:
    key = os.environ.get(API_KEY_VARIABLE)
    return [("authorization", f"Bearer {key}")] if key else []


def _summary(finish: tokens_pb2.Finish, elapsed_s: float, first_s: float) -> None:
    reason = FINISHES.get(finish.reason, "unknown")
    text = f"{finish.generated_tokens} tokens in {elapsed_s:.2f} s, first after {first_s * 1000:.0f} ms"
    text += f", {reason}, by {finish.replica or '-'}"
    if finish.message:
        text += f": {finish.message}"
    print(text, file=sys.stderr)
