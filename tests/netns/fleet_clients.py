"""Clients of the fleet of test_whole_fleet.py: official openai clients that stream through its edges."""

from __future__ import annotations

import asyncio
import os
import secrets
import ssl
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import httpx
import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatoken.worker.models import TINY_LLAMA, prepare
from tests.netns.fleet import EDGE_PORT, KEY, Fleet
from tests.support.collector import Seen

TOKENS = {"smol": 20, "tiny": 40}
STREAMS = 1  # of each model
PACE_S = 3.0  # from one question of a stream to the next at least: two cores also start engines
QUESTIONS = ("What is the capital of Japan?", "Name three colours.", "Count to five.")


def answers_of_transformers() -> list[str]:
    """What another implementation of the tiny model answers, on one thread and in one process."""
    directory = prepare(TINY_LLAMA, lambda _line: None)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**asked, do_sample=False, max_new_tokens=TOKENS["tiny"])
        found.append(tokenizer.decode(made[0][asked["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


@dataclass
class Report:
    """What clients saw."""

    answers: Counter[str] = field(default_factory=Counter)
    asked_again: Counter[str] = field(default_factory=Counter)  # a door died under it
    refused: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


class Clients:
    """openai clients that stream from a thread, each through the edges in turn, until `stop`."""

    def __init__(self, fleet: Fleet, models: Sequence[str] = tuple(TOKENS)) -> None:
        self.report = Report()
        self._fleet = fleet
        self._models = models
        self._expected: dict[tuple[str, str], str] = {}
        self._stopping = threading.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Clients:
        self._thread.start()
        if not self._started.wait(120):
            raise RuntimeError(f"the fleet does not answer: {self.report}\n{self._fleet.events()}")
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(120)

    def answers(self, model: str) -> list[str]:
        """To each question."""
        return [self._expected[model, question] for question in QUESTIONS]

    def answered(self, more: int, timeout_s: float = 120.0) -> None:
        """Waits until every model has answered so often since now."""
        before = Counter(self.report.answers)
        deadline = time.monotonic() + timeout_s
        while any(self.report.answers[model] - before[model] < more for model in self._models):
            if time.monotonic() > deadline or self.report.wrong or self.report.lost:
                raise AssertionError(f"{self.report}, before: {before}")
            time.sleep(0.1)

    def stop(self) -> Report:
        """Lets every running request end."""
        self._stopping.set()
        self._thread.join(300)
        if self._thread.is_alive():
            raise AssertionError("a request hangs")
        return self.report

    def ask_each(self) -> int:
        """Every question of every model through every edge, once the others have stopped; tokens received."""

        async def ask() -> int:
            doors = self._doors()
            every = [(door, model, question) for door in doors for model in self._models for question in QUESTIONS]
            answers = await asyncio.gather(*(self._ask(door, model, question) for door, model, question in every))
            for (_, model, question), (text, _) in zip(every, answers, strict=True):
                assert text == self._expected[model, question]
            return sum(tokens for _, tokens in answers)

        return asyncio.run(ask())

    def trace(self, model: str) -> list[Seen]:
        """The spans of one request that asks to be traced, once its edge's, router's and worker's are there."""
        trace, traced = secrets.token_hex(16), "01"

        async def ask() -> None:
            headers = {"traceparent": f"00-{trace}-{secrets.token_hex(8)}-{traced}"}
            await self._ask(self._doors()[0], model, QUESTIONS[0], headers)

        asyncio.run(ask())
        return self._fleet.collector.wait(3, trace)

    def _doors(self) -> list[openai.AsyncOpenAI]:
        """A client of each edge."""
        fleet = self._fleet
        cert, key = fleet.authority.issue("client")
        context = ssl.create_default_context(cafile=fleet.authority.ca_file)
        context.load_cert_chain(cert, key)
        return [
            openai.AsyncOpenAI(
                base_url=f"https://{host.address}:{EDGE_PORT}/v1",
                api_key=KEY,
                max_retries=0,
                http_client=httpx.AsyncClient(verify=context, timeout=httpx.Timeout(300, connect=3)),
            )
            for host in fleet.network.hosts
        ]

    async def _run(self) -> None:
        doors = self._doors()
        for model in self._models:
            for question in QUESTIONS:
                self._expected[model, question], _ = await self._ask(doors[0], model, question)
        self._started.set()
        asks = [self._keep_asking(doors, model, number) for model in self._models for number in range(STREAMS)]
        await asyncio.gather(*asks)

    async def _keep_asking(self, doors: Iterable[openai.AsyncOpenAI], model: str, number: int) -> None:
        doors, turn = list(doors), number
        while not self._stopping.is_set():
            question = QUESTIONS[number % len(QUESTIONS)]
            began = time.monotonic()
            while True:
                turn += 1
                try:
                    text, _ = await self._ask(doors[turn % len(doors)], model, question)
                    break
                except (openai.APIConnectionError, httpx.TransportError) as error:
                    self.report.asked_again[model] += 1
                    if time.monotonic() - began > 300:
                        self.report.lost.append(f"{model}: {error!r}")
                        return
                    await asyncio.sleep(0.5)
                except openai.InternalServerError as error:  # 503: the model is blocked, and the answer says why
                    step = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition("::")[2]
                    self.report.refused[model].append(f"{error} [{step}]")
                    if time.monotonic() - began > 300:
                        self.report.lost.append(f"{model}: {error!r}")
                        return
                    await asyncio.sleep(0.5)
                except openai.APIError as error:
                    self.report.lost.append(f"{model}: {error!r}")
                    return
            self.report.slowest_s = max(self.report.slowest_s, time.monotonic() - began)
            self.report.answers[model] += 1
            await asyncio.sleep(max(0.0, began + PACE_S - time.monotonic()))
            if text != self._expected[model, question]:
                self.report.wrong.append(f"{model}: {text!r} for {self._expected[model, question]!r}")

    async def _ask(
        self, door: openai.AsyncOpenAI, model: str, question: str, headers: Mapping[str, str] | None = None
    ) -> tuple[str, int]:
        """The answer, and how many tokens it had."""
        chunks = await door.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=TOKENS[model],
            stream=True,
            stream_options={"include_usage": True},
            extra_headers=headers,
        )
        parts, ended, tokens = [], None, 0
        async for chunk in chunks:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            if chunk.choices:
                parts.append(chunk.choices[0].delta.content or "")
                ended = chunk.choices[0].finish_reason
        if ended is None:
            raise httpx.ReadError("the stream ended early")
        return "".join(parts), tokens
