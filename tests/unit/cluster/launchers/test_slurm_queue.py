"""What Slurm's commands print, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatoken.cluster.launchers.slurm import queue
from megatoken.cluster.launchers.slurm.queue import JobState, SlurmError, look, state_of, submit

# Printed by Slurm 22.05.
RUNNING = (
    "JobId=7 JobName=megatoken-lab UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901754 Nice=0 "
    "JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0 "
    "RunTime=00:00:03 NodeList=node[0-1] BatchHost=node0 NumNodes=2 StdErr=/work/megatoken-7.log StdIn=/dev/null "
    "StdOut=/work/megatoken-7.log Power="
)


def test_a_jobs_state_is_read_from_what_scontrol_prints() -> None:
    assert state_of(RUNNING) == JobState("RUNNING", "None", "node[0-1]", "0:0", "/work/megatoken-7.log")
    waiting = state_of("JobId=8 JobState=PENDING Reason=Resources NodeList=(null) ExitCode=0:0")
    assert (waiting.state, waiting.reason, waiting.nodes) == ("PENDING", "Resources", "")


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED"])
def test_a_job_goes_on(state: str) -> None:
    assert not JobState(state).ended


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", ""])
def test_a_job_has_ended_in_states_that_it_does_not_leave(state: str) -> None:
    assert JobState(state).ended


def program(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_commands_that_are_missing_or_refuse_are_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="sbatch is not installed on this machine"):
        submit("")
    program(tmp_path, "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(SlurmError, match="sbatch: sbatch: error: invalid partition specified: gpu"):
        submit("")
    program(tmp_path, "sbatch", "echo '12;west'")
    assert submit("") == 12
    program(tmp_path, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert look(12) == JobState("")
    program(tmp_path, "scontrol", "exec /bin/sleep 30")
    monkeypatch.setattr(queue, "COMMAND_S", 0.2)
    with pytest.raises(SlurmError, match="scontrol: no answer within"):
        look(12)
