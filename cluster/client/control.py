"""The command line's way to the controller: which cluster is meant, and calls with deadlines and clear errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc

from megatoken.access.channel import Present, presenting
from megatoken.access.credentials import METADATA_KEY
from megatoken.access.files import read_private
from megatoken.cluster.client.records import ClusterRecord, alive, read_records
from megatoken.tls import ClientTls
from megatoken.v1 import control_pb2, control_pb2_grpc

CALL_TIMEOUT_S = 10.0
ROTATE_TIMEOUT_S = 60.0  # every process is told, one may be out of reach
TOKEN_VARIABLE = "MEGATOKEN_TOKEN_FILE"


class CommandError(Exception):
    """A command cannot be carried out; the text is for the user, the status for the shell."""

    def __init__(self, message: str, status: int = 1) -> None:
        self.status = status
        super().__init__(message)


def choose(directory: Path, cluster: str | None, control: str | None, token_file: str | None = None) -> ClusterRecord:
    """The cluster that is meant: --control, --cluster, or the only one there is. Raises CommandError.

    `token_file` goes before the file that `up` wrote here.
    """
    if control is not None:
        host, _, port = control.rpartition(":")
        if not host or not port.isdigit():
            raise CommandError(f"--control: {control!r} is not allowed; HOST:PORT", 2)
        known = next((record for record in read_records(directory) if record.control == control), None)
        found = known or ClusterRecord(cluster=cluster or "", control=control)
    else:
        found = _running(directory, cluster)
    return found.model_copy(update={"token_file": token_file}) if token_file else found


def _running(directory: Path, cluster: str | None) -> ClusterRecord:
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
    """Calls one controller, as the operator whose token is given. A context manager; errors become CommandError."""

    def __init__(self, address: str, tls: ClientTls | None = None, token: str = "") -> None:
        self.address = address
        self._channel = presenting(open_sync_channel(address, tls), shown(token))
        self._stub = control_pb2_grpc.ControlStub(self._channel)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def apply(self, spec_yaml: str, *, dry_run: bool) -> control_pb2.ApplyResponse:
        with self._named_errors():
            request = control_pb2.ApplyRequest(spec_yaml=spec_yaml, dry_run=dry_run)
            return self._stub.Apply(request, timeout=CALL_TIMEOUT_S)

    def scale(self, model: str, replicas: int, *, dry_run: bool = False) -> control_pb2.ScaleResponse:
        request = control_pb2.ScaleRequest(model=model, replicas=replicas, dry_run=dry_run)
        with self._named_errors():
            return self._stub.Scale(request, timeout=CALL_TIMEOUT_S)

    def drain(self, request: control_pb2.DrainTargetRequest) -> control_pb2.DrainTargetResponse:
        with self._named_errors():
            return self._stub.DrainTarget(request, timeout=CALL_TIMEOUT_S)

    def cordon(self, request: control_pb2.CordonRequest) -> control_pb2.CordonResponse:
        with self._named_errors():
            return self._stub.Cordon(request, timeout=CALL_TIMEOUT_S)

    def history(self, seconds: float) -> control_pb2.History:
        with self._named_errors():
            return self._stub.GetHistory(control_pb2.GetHistoryRequest(seconds=seconds), timeout=CALL_TIMEOUT_S)

    def status(self) -> control_pb2.ClusterStatus:
        with self._named_errors():
            return self._stub.GetStatus(control_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)

    def rotate_tokens(self) -> str:
        """Makes every token of the cluster anew; returns the operator's."""
        with self._named_errors():
            reply = self._stub.RotateTokens(control_pb2.RotateTokensRequest(), timeout=ROTATE_TIMEOUT_S)
            return str(reply.operator_token)

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
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise CommandError(f"{details}; name the operator's token with --token-file or {TOKEN_VARIABLE}") from None
        if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
            raise CommandError(details, 2) from None
        raise CommandError(f"{code.name}: {details}") from None


def client_of(record: ClusterRecord) -> ControlClient:
    """A client of a cluster's controller, with the token that its record names."""
    return ControlClient(record.control, record.tls, token_of(record))


def token_of(record: ClusterRecord) -> str:
    """The operator's token; empty when no file is known. Raises RequestError for a file that cannot be used."""
    return read_private(Path(record.token_file), "--token-file").strip() if record.token_file else ""


def shown(token: str) -> Present | None:
    """What every call carries to show the token."""
    return (lambda: ((METADATA_KEY, token),)) if token else None


class Unreachable(CommandError):
    """The controller does not answer."""


def open_sync_channel(address: str, tls: ClientTls | None) -> grpc.Channel:
    """A blocking channel, plain or TLS. Raises Unreachable for certificates that cannot be read."""
    if tls is None:
        return grpc.insecure_channel(address)
    options = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    try:
        credentials = tls.credentials()
    except OSError as error:
        raise Unreachable(f"the controller at {address} cannot be reached: {error}") from None
    return grpc.secure_channel(address, credentials, options=options)
