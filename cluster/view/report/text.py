"""A summary as one page of text. Pure."""

from __future__ import annotations

from collections.abc import Callable

from megatoken.cluster.decide.efficiency import CAUSES
from megatoken.cluster.view.human import duration, number, table
from megatoken.cluster.view.report.summary import ModelSummary, Summary

LAST_SHOWN = 10  # of starts, and of failures


def report_text(summary: Summary, clock: Callable[[float], str]) -> str:
    """`clock` writes a time."""
    return "\n\n".join(part for part in ("\n".join(lines) for lines in sections(summary, clock)) if part)


def sections(summary: Summary, clock: Callable[[float], str]) -> list[list[str]]:
    """Lines, section by section."""
    head = [
        f"cluster {summary.cluster}, {clock(summary.from_s)} to {clock(summary.until_s)}",
        f"the history covers {duration(summary.covered_s)} of it; requests that went on at another replica:"
        f" {summary.failovers:,}; refused: {summary.refused:,}",
    ]
    out = [f"out of service: {device}" for device in summary.devices_out]
    return [
        head,
        table(MODEL_HEADER, [model_cells(model) for model in summary.models]),
        table(LOSS_HEADER, [loss_cells(model) for model in summary.models if model.capacity]),
        [f"{clock(at)}  {replica} ready {said}".rstrip() for at, replica, said in summary.starts[-LAST_SHOWN:]],
        [f"{clock(at)}  {replica} failed: {why}" for at, replica, why in summary.failures[-LAST_SHOWN:]],
        out,
    ]


MODEL_HEADER = [
    *("MODEL", "GENERATED", "PROMPT", "CACHED", "DONE", "FAILED", "TOKENS/S"),
    *("DEVICE HOURS", "TOKENS/J", "COST", "PER MILLION"),
]
LOSS_HEADER = ["MODEL", "CAPACITY", "OF BEST", *(cause.upper() for cause in CAUSES)]


def model_cells(model: ModelSummary) -> list[str]:
    """In the order of MODEL_HEADER."""
    hours = ", ".join(f"{kind or '?'} {value:.2f}" for kind, value in sorted(model.device_hours.items())) or "-"
    return [
        model.model,
        f"{model.generated_tokens:,}",
        f"{model.prompt_tokens:,}",
        f"{model.cached_tokens:,}",
        f"{model.finished:,}",
        f"{model.failed:,}",
        number(model.tokens_per_s),
        hours,
        _known(model.tokens_per_joule, "{:.2f}"),
        _known(model.cost, "{:,.2f}"),
        _known(model.cost_per_million, "{:,.3f}"),
    ]


def loss_cells(model: ModelSummary) -> list[str]:
    """In the order of LOSS_HEADER: shares of the capacity."""
    lost = [f"{model.lost[cause] / model.capacity:.0%}" for cause in CAUSES]
    return [model.model, number(model.capacity), _known(model.share_of_best, "{:.0%}"), *lost]


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
