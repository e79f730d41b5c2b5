"""A summary as one HTML page that needs nothing from elsewhere: tables, and each model's rate as a plot. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Final

from megatoken.cluster.view.human import number
from megatoken.cluster.view.report.summary import ModelSummary, Summary
from megatoken.cluster.view.report.text import LOSS_HEADER, MODEL_HEADER, loss_cells, model_cells, sections

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 160, 60, 22
STYLE: Final = """
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#667;--line:#d5d9e0;--rate:#0b6bcb;--best:#b9540a;--back:#fff}
@media(prefers-color-scheme:dark){
:root{--ink:#e8eaee;--dim:#9aa;--line:#39404a;--rate:#6db3ff;--best:#ffa65c;--back:#14171b}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--back)}
body{max-width:64rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--dim);font-weight:600;font-size:.8rem}
svg{width:100%;height:auto}text{fill:var(--dim);font-size:11px}
.rate{stroke:var(--rate)}.best{stroke:var(--best);stroke-dasharray:4 3}
polyline{fill:none;stroke-width:1.6}.axis{stroke:var(--line)}p,li{color:var(--ink)}.dim{color:var(--dim)}
"""


def report_page(summary: Summary, clock: Callable[[float], str]) -> str:
    """`clock` writes a time."""
    head, _, _, starts, failures, out = sections(summary, clock)
    parts = [
        f"<h1>{escape(summary.cluster)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in head),
        _table(MODEL_HEADER, [model_cells(model) for model in summary.models]),
        "<h2>Capacity, and what it is lost to</h2>",
        _table(LOSS_HEADER, [loss_cells(model) for model in summary.models if model.capacity]),
        *(_plot(model, clock) for model in summary.models if len(model.rates) > 1),
        *_list("Starts", starts),
        *_list("Failures", failures),
        *_list("Devices out of service", out),
    ]
    title = f"Megatoken: {escape(summary.cluster)}"
    meta = f'<meta charset="utf-8"><title>{title}</title><meta name="viewport" content="width=device-width">'
    body = "".join(parts)
    return f'<!doctype html><html lang="en">{meta}<style>{STYLE}</style><body>{body}</body></html>\n'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(cell.capitalize())}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>" if rows else '<p class="dim">nothing is known</p>'


def _list(title: str, lines: Sequence[str]) -> list[str]:
    return [f"<h2>{title}</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"] if lines else []


def _plot(model: ModelSummary, clock: Callable[[float], str]) -> str:
    """Tokens/s and capacity over time."""
    first, last = model.rates[0][0], model.rates[-1][0]
    top = max(max(rate, capacity) for _, rate, capacity in model.rates) or 1.0

    def line(kind: str, values: Sequence[float]) -> str:
        across = [LEFT + (at - first) / (last - first) * (WIDTH - LEFT) for at, _, _ in model.rates]
        down = [(1 - value / top) * (HEIGHT - BOTTOM) + 4 for value in values]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
        return f'<polyline class="{kind}" points="{points}"/>'

    floor = HEIGHT - BOTTOM + 4
    label = f"{escape(model.model)}: generated tokens a second, and its capacity (dashed)"
    return (
        f'<h2>{label}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{WIDTH}" y2="{floor}"/>'
        f'<text x="0" y="14">{escape(number(top))}</text><text x="0" y="{floor}">0</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 2}">{escape(clock(first))}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 2}" text-anchor="end">{escape(clock(last))}</text>'
        + line("best", [capacity for _, _, capacity in model.rates])
        + line("rate", [rate for _, rate, _ in model.rates])
        + "</svg>"
    )
