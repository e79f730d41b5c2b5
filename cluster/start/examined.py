"""The doctor's word before a launch: warnings are said, and what would stop the launch stops it here."""

from __future__ import annotations

from collections.abc import Sequence

from megatoken.cluster.client.control import CommandError
from megatoken.cluster.client.progress import Progress
from megatoken.cluster.doctor.examine import CannotExamine, examine, findings_of
from megatoken.cluster.doctor.facts import Finding, Severity
from megatoken.cluster.doctor.judge import stops
from megatoken.cluster.doctor.text import refusal_text
from megatoken.cluster.spec.cluster import ClusterSpec


def examine_nodes(spec: ClusterSpec, progress: Progress) -> None:
    """Looks at every node of the spec's running Ray, and at the connections between them. Raises CommandError.

    The all-reduce of `megatoken doctor` is left out: a launch does not wait for a measurement that grows with the
    number of nodes.
    """
    try:
        seen = examine(spec, spec.ray.address, reductions=False, report=progress.say)
    except CannotExamine as error:
        raise CommandError(str(error)) from None
    refuse(findings_of(spec, seen), progress)


def refuse(findings: Sequence[Finding], progress: Progress) -> None:
    """Says the warnings. Raises CommandError where something would stop the launch."""
    for finding in findings:
        if finding.severity is Severity.WARN:
            progress.say(f"doctor: {finding.subject}: {finding.what}")
    if stops(findings):
        raise CommandError(refusal_text(findings))
