"""Findings in words, for people."""

from __future__ import annotations

from collections.abc import Sequence

from megatoken.cluster.doctor.facts import Finding, Severity

MARKS = {Severity.STOP: "STOP", Severity.WARN: "warn", Severity.GOOD: "ok"}


def findings_text(findings: Sequence[Finding]) -> str:
    """One or two lines a finding, then the verdict."""
    worst = sum(finding.severity is Severity.STOP for finding in findings)
    warned = sum(finding.severity is Severity.WARN for finding in findings)
    verdict = f"{worst} would stop a launch" if worst else "nothing would stop a launch"
    return "\n".join([*_lines(findings), f"{verdict}; {warned} warning{'' if warned == 1 else 's'}"])


def refusal_text(findings: Sequence[Finding]) -> str:
    """What stops a launch, and how to launch nevertheless."""
    found = [finding for finding in findings if finding.severity is Severity.STOP]
    return "\n".join(["the launch was stopped before it began (--no-doctor launches nevertheless):", *_lines(found)])


def _lines(findings: Sequence[Finding]) -> list[str]:
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.severity]:4}  {finding.check:13}  {finding.subject}: {finding.what}")
        if finding.do:
            lines.append(f"{'':21}-> {finding.do}")
    return lines
