"""`megatoken top`: the live view of a cluster, or one picture of it as an SVG.

cluster/cli/look/top.py calls these with the controller's address and a way to open channels with its credentials.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from textual.pilot import Pilot

from megatoken.cluster.view.top.app import Top
from megatoken.cluster.view.top.feed import Feed, OpenChannel

SCREENSHOT_SIZE = (100, 30)


def run_top(control_address: str, open_to: OpenChannel) -> None:
    """Shows the live view until the user quits. A controller that does not answer is waited for, and said so."""

    async def show() -> None:
        feed = Feed(control_address, open_to)
        feed.start()
        try:
            await Top(feed).run_async(mouse=False)
        finally:
            await feed.close()

    asyncio.run(show())


def save_top(
    control_address: str, open_to: OpenChannel, path: Path, after_s: float, size: tuple[int, int] = SCREENSHOT_SIZE
) -> None:
    """Watches for `after_s` seconds without a terminal, then writes the screen as an SVG."""

    async def show() -> None:
        feed = Feed(control_address, open_to)
        feed.start()
        app = Top(feed)

        async def snap(pilot: Pilot[object]) -> None:
            await asyncio.sleep(after_s)
            app.redraw()
            await pilot.pause()
            path.write_text(without_fonts(app.export_screenshot(title="megatoken top")))
            app.exit()

        try:
            await app.run_async(headless=True, size=size, auto_pilot=snap)
        finally:
            await feed.close()

    asyncio.run(show())


def without_fonts(svg: str) -> str:
    """The picture without links to fonts on the web: a viewer's own monospace font shows it, and nothing is fetched."""
    return re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL)
