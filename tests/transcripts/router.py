"""Transcripts of the router's core: requests, frames, losses and time in; what workers and clients are told out.

fleet replicas=2 [max_running=4] [key=value ...]   settings of RouterConfig as JSON
submit a [max_tokens=5] [prompt=3] [key=value ...]
tokens a 11 12           the replica that has it sends these
finish a [reason=stop]   and its end
cancel a | lose m-0 | connect m-0 | tick [seconds]
show                     states, places and charges
"""

from __future__ import annotations

import json
from typing import Any

from megatoken.errors import MegatokenError
from megatoken.router.core.request import Request
from megatoken.v1 import tokens_pb2
from tests.support.router_core import CoreFleet, ScriptedLink
from tests.transcripts.transcript import Command

REASONS = {name.removeprefix("FINISH_REASON_").lower(): value for name, value in tokens_pb2.FinishReason.items()}
NAMES = {value: name for name, value in REASONS.items()}


class RouterScript:
    """One transcript's router."""

    def __init__(self) -> None:
        self._fleet = CoreFleet(replicas=0)
        self._requests: dict[str, Request] = {}
        self._links: dict[str, ScriptedLink] = {}
        self._frames_seen = 0

    def run(self, command: Command) -> list[str]:
        said = self._run(command)
        return [*said, *self._told_workers(), *self._told_clients()]

    def _run(self, command: Command) -> list[str]:
        fleet, name = self._fleet, command.words[0] if command.words else ""
        match command.name:
            case "fleet":
                options = {key: json.loads(value) for key, value in command.options.items()}
                self._fleet = CoreFleet(**options)
            case "submit":
                return self._submit(name, {key: json.loads(value) for key, value in command.options.items()})
            case "tokens":
                fleet.tokens(self._requests[name], *map(int, command.words[1:]))
            case "finish":
                fleet.finish(self._requests[name], REASONS[command.options.get("reason", "stop")])
            case "cancel":
                fleet.cancel(self._requests[name])
            case "lose":
                fleet.lose(self._replica(name))
            case "connect":
                fleet.connect(self._replica(name))
            case "tick":
                fleet.tick(float(name or 0))
            case "show":
                return self._show()
            case _:
                raise ValueError(f"no such command: {command.name}")
        return []

    def _submit(self, name: str, fields: dict[str, Any]) -> list[str]:
        prompt = tuple(range(1, 1 + fields.pop("prompt", 3)))
        try:
            self._requests[name] = self._fleet.submit(prompt, **fields)
        except MegatokenError as error:
            return [f"{name} refused: {type(error).__name__}: {error}"]
        return []

    def _replica(self, name: str) -> Any:
        return next(replica for replica in self._fleet.replicas_now() if replica.name == name)

    def _told_workers(self) -> list[str]:
        lines = []
        for replica in self._fleet.replicas_now():
            link = replica.link
            if not isinstance(link, ScriptedLink):
                continue
            before = self._links.setdefault(replica.name, ScriptedLink())
            for slot, request in link.started.items():
                if before.started.get(slot) is not request:
                    resumed = f" resumed={request.resumed_tokens}" if request.resumed_tokens else ""
                    lines.append(
                        f"=> {replica.name}: start slot {slot} prompt={list(request.prompt)} "
                        f"max_tokens={request.sampling.max_tokens}{resumed}"
                    )
            lines += [f"=> {replica.name}: cancel slot {slot}" for slot in link.cancelled[len(before.cancelled) :]]
            lines += [f"=> {replica.name}: cut ({why})" for why in link.cuts[len(before.cuts) :]]
            lines += [f"=> {replica.name}: probe"] * (link.probes - before.probes)
            kept = ScriptedLink()
            kept.started, kept.cancelled, kept.cuts = dict(link.started), list(link.cancelled), list(link.cuts)
            kept.probes = link.probes
            self._links[replica.name] = kept
        return lines

    def _told_clients(self) -> list[str]:
        self._fleet.collect()
        names = {request.stream: name for name, request in self._requests.items()}
        lines = []
        for frame in self._fleet.frames[self._frames_seen :]:
            at = 0
            for stream, count in zip(frame.stream, frame.count or [1] * len(frame.stream), strict=True):
                lines.append(f"<= {names[stream]}: {list(frame.token[at : at + count])}")
                at += count
            for finish in frame.finish:
                told = f"<= {names[finish.stream]}: {NAMES[finish.reason]}"
                if finish.message:
                    told += f" ({finish.code}: {finish.message})"
                counts = f"prompt={finish.prompt_tokens} generated={finish.generated_tokens} resumes={finish.resumes}"
                lines.append(f"{told} {counts}" + (f" note={finish.resume_note}" if finish.resume_note else ""))
        self._frames_seen = len(self._fleet.frames)
        return lines

    def _show(self) -> list[str]:
        lines = []
        for name, request in self._requests.items():
            at = f" on {request.replica.name}" if request.replica is not None else ""
            lines.append(f"{name}: {request.state}{at} ({', '.join(request.history) or 'nothing yet'})")
        for replica in self._fleet.replicas_now():
            lines.append(
                f"{replica.name}: {'connected' if replica.connected else 'away'}, circuit {replica.circuit.state}, "
                f"in flight {replica.in_flight}, outstanding {replica.prompt_outstanding:g} prompt and "
                f"{replica.decode_outstanding:g} decode tokens"
            )
        pool = self._fleet.pool
        lines.append(f"queued {pool.queue.length}, suspects {pool.queue.suspects}, open {len(pool.open)}")
        return lines
