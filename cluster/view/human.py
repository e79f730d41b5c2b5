"""Times, numbers and tables for people. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def number(value: float) -> str:
    """1,234 or 12.3: as many digits as say something."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def gib(size: int) -> str:
    """12.3 GiB, or 4.5 MiB of what is small."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 or not size else f"{size / 2**20:.1f} MiB"


def bar(done: int, total: int, width: int = 24) -> str:
    """[######------] 50 %"""
    share = done / total if total else 1.0
    filled = int(share * width)
    return f"[{'#' * filled}{'-' * (width - filled)}] {share:.0%}".replace("%", " %")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as their contents; numbers stand right."""
    widths = [max(len(str(row[column])) for row in [header, *rows]) for column in range(len(header))]
    right = [all(_numeric(row[column]) for row in rows) and bool(rows) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _numeric(cell: str) -> bool:
    return cell in ("", "-") or cell.replace(",", "").replace(".", "", 1).removesuffix(" %").isdigit()
