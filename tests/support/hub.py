"""A stand-in for the Hugging Face hub: one model, whose files come from a directory; HF_ENDPOINT names it."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

COMMIT = "5ca1ab1e" * 5


class Hub:
    """Serves `directory` as `model`, whose branch main is at COMMIT. Use it as a context manager."""

    def __init__(self, model: str, directory: Path, address: str) -> None:
        """`address`: of this machine, to listen on."""
        self.model = model
        self.files = {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}
        self.sent: list[tuple[str, str]] = []  # address of the client, name of the file
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer((address, 0), Handler)
        self.endpoint = f"http://{address}:{self._server.server_port}"

    def answer(self, to: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = to.path.partition("?")[0]
        api, resolve = f"/api/models/{self.model}", f"/{self.model}/resolve/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            listed = [{"rfilename": name} for name in self.files]
            self._send(to, json.dumps({"id": self.model, "sha": COMMIT, "siblings": listed}).encode(), with_body)
        elif path.startswith(f"{api}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in self.files.items()
            ]
            self._send(to, json.dumps(tree).encode(), with_body)
        elif path.startswith(resolve) and (name := path.removeprefix(resolve).partition("/")[2]) in self.files:
            data = self.files[name].read_bytes()
            if with_body:
                self.sent.append((to.client_address[0], name))
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self._send(to, data, with_body, {"ETag": etag, "X-Repo-Commit": COMMIT})
        else:
            self._send(to, b"{}", with_body, {"X-Error-Code": "EntryNotFound"}, status=404)

    def _send(
        self,
        to: BaseHTTPRequestHandler,
        data: bytes,
        with_body: bool,
        headers: dict[str, str] | None = None,
        status: int = 200,
    ) -> None:
        to.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            to.send_header(name, value)
        to.end_headers()
        if with_body:
            to.wfile.write(data)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
