"""Slurm's commands: submits a job, tells how it is, runs a command in it, ends it. Each with a deadline."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

COMMAND_S = 60.0  # slurmctld may be busy with other people's jobs
ENDED = frozenset(  # those job state codes of squeue(1) that a job does not leave
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)


class SlurmError(RuntimeError):
    """A command of Slurm could not be run or refused. One sentence: which, and what it said."""


@dataclass(frozen=True, slots=True)
class JobState:
    """What slurmctld knows of a job."""

    state: str
    """PENDING, RUNNING, COMPLETING, COMPLETED, ...; empty: it is not known any more."""
    reason: str = ""
    """Why it waits, e.g. Resources or Priority; "None" or empty: it does not."""
    nodes: str = ""
    """As Slurm writes them, e.g. node[0-2]."""
    exit_code: str = ""
    log: str = ""
    """The file that its output goes to, on its first node or on what they share."""

    @property
    def ended(self) -> bool:
        return not self.state or self.state in ENDED


def submit(script: str) -> int:
    """Hands a job script to sbatch; the job's id. Its output goes below the working directory. Raises SlurmError."""
    printed = _run(["sbatch", "--parsable"], script)
    number = printed.strip().partition(";")[0]  # JOB;CLUSTER where there are several
    if not number.isdigit():
        raise SlurmError(f"sbatch: printed {printed.strip()[:200]!r} where a job's id was expected")
    return int(number)


def look(job: int) -> JobState:
    """How a job is. Raises SlurmError."""
    try:
        return state_of(_run(["scontrol", "--oneliner", "show", "job", str(job)]))
    except SlurmError as error:
        if "Invalid job id" in str(error):  # it ended long ago
            return JobState("")
        raise


def state_of(line: str) -> JobState:
    """Reads `scontrol --oneliner show job`. Pure."""
    fields: Mapping[str, str] = dict(re.findall(r"(\w+)=(\S*)", line))
    nodes = fields.get("NodeList", "")
    return JobState(
        fields.get("JobState", ""),
        fields.get("Reason", ""),
        "" if nodes == "(null)" else nodes,
        fields.get("ExitCode", ""),
        fields.get("StdOut", ""),
    )


def run_inside(job: int, shell: str, timeout_s: float | None = None) -> str:
    """Runs a shell command on the job's first node, beside what runs there; what it printed. Raises SlurmError."""
    words = ["srun", f"--jobid={job}", "--overlap", "--relative=0", "--nodes=1", "--ntasks=1", "bash", "-c", shell]
    return _run(words, timeout_s=timeout_s)


def cancel(job: int) -> None:
    """Ends a job at once. Raises SlurmError."""
    _run(["scancel", str(job)])


def _run(words: list[str], given: str = "", timeout_s: float | None = None) -> str:
    timeout_s = timeout_s or COMMAND_S
    try:
        done = subprocess.run(words, input=given, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise SlurmError(
            f"{words[0]} is not installed on this machine; run `megatoken up` where jobs are submitted, or "
            "`megatoken render slurm` and submit the script there"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]}: no answer within {timeout_s:.0f} s") from None
    if done.returncode:
        said = " ".join(done.stderr.split())[-400:] or f"exit status {done.returncode}"
        raise SlurmError(f"{words[0]}: {said}")
    return done.stdout
