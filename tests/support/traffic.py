"""Keeps a router busy until it is killed: python -m tests.support.traffic HOST:PORT MODEL [MODEL ...]

A few streams a model, prompts of several lengths, now and then one that is cancelled, one that is wrong and one for a
model that is not there: so that every kind of metric moves.
"""

from __future__ import annotations

import asyncio
import random
import sys

from megatoken.errors import MegatokenError
from megatoken.router.client.client import TokenClient

STREAMS = 6  # a model, at once
PAUSE_S = 0.05


async def one(client: TokenClient, model: str, rng: random.Random) -> None:
    """One request, of a kind that chance chooses."""
    kind = rng.random()
    prompt = [rng.randrange(100, 40_000)] * rng.choice((16, 64, 256, 1024))
    if kind < 0.05:
        model, prompt = ("no-such-model", prompt) if kind < 0.025 else (model, [])
    stream = client.generate(model, prompt, max_tokens=rng.choice((16, 64, 128)), temperature=0.0)
    async for _delta in stream:
        if 0.05 <= kind < 0.1:
            stream.cancel()


async def keep_on(client: TokenClient, model: str, rng: random.Random) -> None:
    """Requests of one model, one after the other."""
    while True:
        try:
            await asyncio.wait_for(one(client, model, rng), 30)
        except (MegatokenError, TimeoutError):
            pass
        await asyncio.sleep(PAUSE_S)


async def main(router: str, *models: str) -> None:
    rng = random.Random(5)
    async with TokenClient([router], connect_timeout_s=30) as client:
        print("busy", flush=True)
        await asyncio.gather(*(keep_on(client, model, rng) for model in models for _ in range(STREAMS)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
