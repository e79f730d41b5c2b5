"""Numbers and time as short text for a terminal: pure functions, used by view.py. None is shown as "-"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

BARS: Final = "▁▂▃▄▅▆▇█"


def whole(value: float | None) -> str:
    """1042110.4 -> "1,042,110"."""
    return "-" if value is None else f"{value:,.0f}"


def compact(value: float | None) -> str:
    """At most six characters: 7.25 -> "7.2", 950 -> "950", 12345 -> "12.3k", 1042110 -> "1.04M"."""
    if value is None:
        return "-"
    if value < 10:
        return f"{value:.1f}".removesuffix(".0")
    for limit, divisor, unit in ((999.5, 1.0, ""), (999_500.0, 1e3, "k"), (999.5e6, 1e6, "M"), (999.5e9, 1e9, "G")):
        if value < limit:
            scaled = value / divisor
            return f"{scaled:.{0 if not unit or scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f}{unit}"
    return f"{value / 1e12:.2f}T"


def percent(share: float | None) -> str:
    """0.934 -> "93%"."""
    return "-" if share is None else f"{share * 100:.0f}%"


def milliseconds(value: float) -> str:
    """4.27 -> "4.3ms", 640 -> "640ms", 12500 -> "12.5s"."""
    if value >= 10_000:
        return f"{value / 1000:.1f}s"
    return f"{value:.0f}ms" if value >= 10 else f"{value:.1f}ms"


def age(seconds: float) -> str:
    """At most four characters: 42 -> "42s", 90 -> "1m", 7300 -> "2h", 200000 -> "2d"."""
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "m"), (86_400, 3600, "h")):
        if seconds < limit:
            return f"{int(max(seconds, 0) // divisor)}{unit}"
    return f"{int(seconds // 86_400)}d"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars, scaled from 0 to the largest of them; "" for none."""
    shown = list(values)[-width:] if width > 0 else []
    top = max(shown, default=0.0)
    if top <= 0:
        return BARS[0] * len(shown)
    return "".join(BARS[min(int(value / top * len(BARS)), len(BARS) - 1)] for value in shown)
