"""`megatoken up` and `down` where the spec asks for a Slurm job: submits it, follows it until it serves, and ends it.

cluster/cli/up.py and cluster/cli/down.py hand over to it, on a machine that has Slurm's commands. The job's number is
kept in the cluster's record. What is asked of the head travels through Slurm (`srun --overlap`), not through a file
system that this machine would have to share.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from megatoken.cluster.client.control import CommandError, Unreachable, client_of
from megatoken.cluster.client.progress import Progress, wait_until_settled
from megatoken.cluster.client.records import (
    ClusterRecord,
    read_records,
    record_path,
    token_path,
    write_record,
    write_token,
)
from megatoken.cluster.launchers.load import launch_of
from megatoken.cluster.launchers.slurm.job import STATE, job_script
from megatoken.cluster.launchers.slurm.queue import JobState, SlurmError, cancel, look, run_inside, submit
from megatoken.cluster.launchers.spec import SlurmLaunch
from megatoken.cluster.runtime_dirs import state_directory
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.start.kept import forget_launch, keep
from megatoken.cluster.view.text import status_text

POLL_S = 1.0
CLEAR_S = 90.0  # past the drain, for Ray to end on every node
LOG_TAIL_LINES = 15


def wants_slurm(spec: ClusterSpec) -> bool:
    """Whether the spec is to be launched as a Slurm job: it says how many nodes, and names no Ray that runs already."""
    return spec.ray.address == "local" and launch_of(spec.launch).slurm is not None


def up_over_slurm(spec: ClusterSpec, *, wait: bool, timeout_s: float, doctor: bool) -> int:
    """Submits the job, waits in the queue for as long as it takes, then until replicas are READY unless told not to.

    `timeout_s` counts from the job's start. Raises CommandError, with the job cancelled.
    """
    states, progress = state_directory(os.environ), Progress()
    _refuse_running(states, spec.cluster)
    try:
        job = submit(job_script(spec, launch_of(spec.launch), doctor=doctor))
    except SlurmError as error:
        raise CommandError(str(error)) from None
    progress.say(f"job {job} is submitted")
    try:
        _wait_for_start(job, progress)
        deadline = time.monotonic() + timeout_s
        record = _wait_for_controller(job, spec, states, deadline, progress)
        with client_of(record) as client:
            if wait:
                wait_until_settled(client, timeout_s=deadline - time.monotonic(), progress=progress)
                print(status_text(client.status()), flush=True)
    except BaseException as error:  # Ctrl-C too: what was submitted must not stay
        progress.say(f"cancelling job {job}")
        _end(job, progress)
        forget_launch(states, spec.cluster)
        if isinstance(error, SlurmError):
            raise CommandError(str(error)) from None
        if isinstance(error, Unreachable):
            raise CommandError(f"{error}; it runs in job {job}: check the network between it and here") from None
        raise
    progress.say(f"cluster {spec.cluster} is up as job {job}; `megatoken down` takes it down")
    return 0


def down_over_slurm(spec: ClusterSpec, record: ClusterRecord, *, drain_s: float) -> None:
    """Drains and ends the fleet inside its job, which ends with it. Raises CommandError."""
    states, progress = state_directory(os.environ), Progress()
    job, slurm = record.slurm_job, _slurm(spec)
    down = f"MEGATOKEN_STATE_DIR={STATE} {shlex.quote(slurm.prefix)}/bin/megatoken down"
    try:
        if not look(job).ended:
            progress.say(f"draining the fleet of job {job}")
            try:
                run_inside(job, f"{down} --cluster {shlex.quote(spec.cluster)} --drain {drain_s:g}", drain_s + CLEAR_S)
            except SlurmError as error:
                progress.say(f"{error}; cancelling the job")
                cancel(job)
            _wait(lambda: look(job).ended, CLEAR_S, f"job {job} to end", progress)
    except SlurmError as error:
        raise CommandError(f"{error}; the job is {job}: run `megatoken down` again, or scancel {job}") from None
    forget_launch(states, spec.cluster)
    progress.say(f"cluster {spec.cluster} is down")


def _slurm(spec: ClusterSpec) -> SlurmLaunch:
    slurm = launch_of(spec.launch).slurm
    if slurm is None:
        raise CommandError("launch.slurm is missing: it says how many nodes and in which partition", 2)
    return slurm


def _wait_for_start(job: int, progress: Progress) -> None:
    told = JobState("")
    while True:
        now = look(job)
        if (now.state, now.reason) != (told.state, told.reason):
            why = f" ({now.reason})" if now.reason not in ("", "None") else ""
            progress.say(f"job {job}: {now.state or 'gone'}{why}{f' on {now.nodes}' if now.nodes else ''}")
            told = now
        if now.ended:
            raise CommandError(_ended_text(job, now))
        if now.state == "RUNNING":
            return
        progress.still(f"job {job} waits in the queue: {now.reason or now.state}")
        time.sleep(POLL_S)


def _wait_for_controller(
    job: int, spec: ClusterSpec, states: Path, deadline: float, progress: Progress
) -> ClusterRecord:
    """The record and the operator's token that the head wrote, kept here as well."""
    there = [path.name for path in (record_path(Path(), spec.cluster), token_path(Path(), spec.cluster))]
    shell = f"cd {STATE} && cat {shlex.quote(there[1])} {shlex.quote(there[0])}"
    while True:
        now = look(job)
        if now.ended:
            raise CommandError(_ended_text(job, now))
        try:
            token, _, text = run_inside(job, shell).partition("\n")
            made = ClusterRecord.model_validate_json(text)
            break
        except SlurmError:
            if time.monotonic() > deadline:
                raise CommandError(f"the controller of job {job} did not serve in time; its log is {now.log}") from None
        except ValueError:
            pass  # half written
        progress.still(f"job {job} starts Ray and the controller")
        time.sleep(POLL_S)
    record = ClusterRecord(
        cluster=spec.cluster,
        control=made.control,
        ray_address=made.ray_address,
        slurm_job=job,
        tls=spec.security.client_tls,
        token_file=str(write_token(states, spec.cluster, token)),
    )
    write_record(states, record)
    keep(states, spec)
    progress.say(f"controller serves at {record.control}; Ray at {record.ray_address}")
    return record


def _refuse_running(states: Path, cluster: str) -> None:
    known = next((record for record in read_records(states) if record.cluster == cluster), None)
    if known is None:
        return
    try:
        if known.slurm_job and look(known.slurm_job).ended:  # its time was over, or somebody cancelled it
            forget_launch(states, cluster)
            return
    except SlurmError as error:
        raise CommandError(str(error)) from None
    raise CommandError(f"cluster: {cluster!r} is not allowed; it is up already, or `megatoken down` it first", 2)


def _end(job: int, progress: Progress) -> None:
    try:
        cancel(job)
        _wait(lambda: look(job).ended, CLEAR_S, f"job {job} to end", progress)
    except (SlurmError, CommandError) as error:
        progress.say(f"{error}; scancel {job} ends it")


def _wait(met: Callable[[], bool], limit_s: float, what: str, progress: Progress) -> None:
    deadline = time.monotonic() + limit_s
    while not met():
        if time.monotonic() > deadline:
            raise CommandError(f"waited {limit_s:.0f} s for {what}")
        progress.still(f"waiting for {what}")
        time.sleep(POLL_S)


def _ended_text(job: int, state: JobState) -> str:
    """What became of a job, with the end of its log where this machine can read it."""
    text = f"job {job} ended before the cluster was up: {state.state or 'gone'}"
    text += f", exit code {state.exit_code}" if state.exit_code not in ("", "0:0") else ""
    try:
        lines = Path(state.log).read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    except OSError:
        return f"{text}; its log is {state.log} on {state.nodes}" if state.log else text
    return "\n".join([f"{text}; the end of its log, {state.log}:", *lines])
