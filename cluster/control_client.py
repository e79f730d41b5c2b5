"""The command line's way to the controller: which cluster is meant, and calls with deadlines and clear errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc

from cluster.clusters import ClusterRecord, alive, read_records
from megatoken.tls import ClientTls
from megatoken.v1 import control_pb2, control_pb2_grpc

CALL_TIMEOUT_S = 10.0


class CommandError(Exception):
    """A command cannot be carried out; the text is for the user, the status for the shell."""

    def __init__(self, message: str, status: int = 1) -> None:
        self.status = status
        super().__init__(message)


def choose(directory: Path, cluster: str | None, control: str | None) -> ClusterRecord:
    """The cluster that is meant: --control, --cluster, or the only one there is. Raises CommandError."""
    if control is not None:
        host, _, port = control.rpartition(":")
        if not host or not port.isdigit():
            raise CommandError(f"--control: {control!r} is not allowed; HOST:PORT", 2)
        return ClusterRecord(cluster=cluster or "", control=control)
    records = [record for record in read_records(directory) if not record.guard_pid or alive(record.guard_pid)]
    if cluster is not None:
        found = next((record for record in records if record.cluster == cluster), None)
        if found is None:
            known = ", ".join(record.cluster for record in records) or "none"
            raise CommandError(f"--cluster: {cluster!r} is not running; running clusters: {known}")
        return found
    if not records:
        raise CommandError("no cluster is running; start one with `megatoken up`, or name one with --control HOST:PORT")
    if len(records) > 1:
        names = ", ".join(record.cluster for record in records)
        raise CommandError(f"--cluster: is missing; several clusters run: {names}", 2)
    return records[0]


class ControlClient:
    """Calls one controller. A context manager; errors become CommandError."""

    def __init__(self, address: str, tls: ClientTls | None = None) -> None:
        self.address = address
        self._channel = open_sync_channel(address, tls)
        self._stub = control_pb2_grpc.ControlStub(self._channel)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def apply(self, spec_yaml: str, *, dry_run: bool) -> control_pb2.ApplyResponse:
        with self._named_errors():
            request = control_pb2.ApplyRequest(spec_yaml=spec_yaml, dry_run=dry_run)
            return self._stub.Apply(request, timeout=CALL_TIMEOUT_S)

    def scale(self, model: str, replicas: int) -> control_pb2.ScaleResponse:
        with self._named_errors():
            return self._stub.Scale(control_pb2.ScaleRequest(model=model, replicas=replicas), timeout=CALL_TIMEOUT_S)

    def drain(self, request: control_pb2.DrainTargetRequest) -> control_pb2.DrainTargetResponse:
        with self._named_errors():
            return self._stub.DrainTarget(request, timeout=CALL_TIMEOUT_S)

    def status(self) -> control_pb2.ClusterStatus:
        with self._named_errors():
            return self._stub.GetStatus(control_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)

    def shut_down(self, drain_timeout_s: float) -> None:
        with self._named_errors():
            self._stub.Shutdown(control_pb2.ShutdownRequest(drain_timeout_s=drain_timeout_s), timeout=CALL_TIMEOUT_S)

    def events(self, after: int = 0, *, follow: bool = False) -> Iterator[control_pb2.Event]:
        """Past events, then new ones with `follow`, until the controller ends."""
        request = control_pb2.WatchEventsRequest(after_sequence=after, follow=follow)
        with self._named_errors():
            yield from self._stub.WatchEvents(request, timeout=None if follow else CALL_TIMEOUT_S)

    def logs(self, name: str, lines: int, *, follow: bool = False) -> Iterator[str]:
        """The last lines of a process, then new ones with `follow`."""
        request = control_pb2.GetLogsRequest(name=name, lines=lines, follow=follow)
        with self._named_errors():
            for chunk in self._stub.GetLogs(request, timeout=None if follow else CALL_TIMEOUT_S):
                yield chunk.text

    def _named_errors(self) -> _NamedErrors:
        return _NamedErrors(self.address)


class _NamedErrors:
    """Turns a gRPC error into one sentence."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, grpc.RpcError):
            return
        code, details = error.code(), error.details()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):  # cancelled: it stopped meanwhile
            raise Unreachable(f"the controller at {self._address} cannot be reached: {details}") from None
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise Unreachable(f"the controller at {self._address} did not answer in {CALL_TIMEOUT_S:.0f} s") from None
        if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
            raise CommandError(details, 2) from None
        raise CommandError(f"{code.name}: {details}") from None


class Unreachable(CommandError):
    """The controller does not answer."""


def open_sync_channel(address: str, tls: ClientTls | None) -> grpc.Channel:
    """A blocking channel, plain or TLS."""
    if tls is None:
        return grpc.insecure_channel(address)
    options = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return grpc.secure_channel(address, tls.credentials(), options=options)
