"""A stand-in for a Kubernetes API server with the KubeRay operator: enough of both for `megatoken up` and `down`.

    python -m tests.support.kubernetes_stand_in [--stuck] [--fail]

Prints its address, then serves over plain HTTP. Objects are kept as they are applied. A RayCluster gets its pods, which
run a moment later, and is then ready; with --stuck a worker is never scheduled, with --fail the cluster fails. A
service answers once the pods run. What is deleted ends a moment later. It judges no schema: another test does.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STEP_S = 0.5
KINDS = {
    "v1": [("configmaps", "ConfigMap"), ("services", "Service"), ("pods", "Pod")],
    "ray.io/v1": [("rayclusters", "RayCluster")],
}
IN_NAMESPACE = r"^/(?:api|apis)/(?:v1|ray\.io/v1)/namespaces/(?P<namespace>[^/]+)"
OBJECT = re.compile(IN_NAMESPACE + r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?$")
PROXY = re.compile(IN_NAMESPACE + r"/services/(?P<service>[^/]+)/proxy/health$")
UNSCHEDULABLE = "0/3 nodes are available: 3 Insufficient amd.com/gpu."


class Objects:
    """What was applied, by (plural, name), with when."""

    def __init__(self, *, stuck: bool, fail: bool) -> None:
        self.stuck, self.fail = stuck, fail
        self.kept: dict[tuple[str, str], dict[str, Any]] = {}
        self.applied_s: dict[tuple[str, str], float] = {}
        self.ends_s: dict[str, float] = {}  # of the pods of a cluster that was deleted

    def steps(self, name: str) -> float:
        """How old a RayCluster is."""
        return (time.monotonic() - self.applied_s.get(("rayclusters", name), time.monotonic())) / STEP_S

    def ray_cluster(self, name: str) -> dict[str, Any] | None:
        found = self.kept.get(("rayclusters", name))
        if found is None:
            return None
        word = "" if self.steps(name) < 2 or self.stuck else "failed" if self.fail else "ready"
        return {**found, "status": {"state": word, "reason": "no image" if word == "failed" else ""}}

    def pods(self, cluster: str) -> list[dict[str, Any]]:
        found = self.kept.get(("rayclusters", cluster))
        if found is None:
            return [_pod("headgroup", running=True)] if time.monotonic() < self.ends_s.get(cluster, 0.0) else []
        up = self.steps(cluster) >= 1
        groups = found["spec"]["workerGroupSpecs"]
        names = [group["groupName"] for group in groups for _ in range(group["replicas"])]
        return [_pod("headgroup", running=up), *(_pod(name, running=up and not self.stuck) for name in names)]


def _pod(group: str, *, running: bool) -> dict[str, Any]:
    scheduled = {"type": "PodScheduled", "status": "True" if running else "False"}
    if not running:
        scheduled |= {"reason": "Unschedulable", "message": UNSCHEDULABLE}
    return {
        "metadata": {"name": f"pod-of-{group}", "labels": {"ray.io/group": group}},
        "status": {"phase": "Running" if running else "Pending", "conditions": [scheduled]},
    }


class Handler(BaseHTTPRequestHandler):
    objects: Objects

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path)
        proxied, found = PROXY.match(path.path), OBJECT.match(path.path)
        if path.path in DISCOVERY:
            self._answer(200, DISCOVERY[path.path])
        elif proxied is not None:
            name = proxied["service"].removeprefix("https:").partition(":")[0]
            state = (self.objects.ray_cluster(name) or {}).get("status", {}).get("state")
            self._answer(200 if state == "ready" and self.objects.steps(name) > 3 else 503, {})
        elif found is None:
            self._missing(path.path)
        elif found["plural"] == "pods":
            selector = urllib.parse.parse_qs(path.query)["labelSelector"][0]
            items = self.objects.pods(selector.partition("=")[2])
            self._answer(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
        else:
            key = (found["plural"], found["name"])
            kept = self.objects.ray_cluster(key[1]) if key[0] == "rayclusters" else self.objects.kept.get(key)
            if kept is None:
                self._missing(key[1])
            else:
                self._answer(200, kept)

    def do_PATCH(self) -> None:
        found = OBJECT.match(urllib.parse.urlsplit(self.path).path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if found is None or self.headers["Content-Type"] != "application/apply-patch+yaml":
            self._answer(415, {"message": "this stand-in takes server-side apply only"})
            return
        if body["metadata"].get("namespace") != found["namespace"]:
            self._answer(400, {"message": "the namespace of the object is not that of the path"})
            return
        key = (found["plural"], found["name"])
        self.objects.kept[key] = body
        self.objects.applied_s.setdefault(key, time.monotonic())
        self._answer(200, body)

    def do_DELETE(self) -> None:
        found = OBJECT.match(urllib.parse.urlsplit(self.path).path)
        key = (found["plural"], found["name"]) if found else ("", "")
        if self.objects.kept.pop(key, None) is None:
            self._missing(key[1])
            return
        self.objects.ends_s[key[1]] = time.monotonic() + 2 * STEP_S
        self._answer(200, {"kind": "Status", "status": "Success"})

    def _missing(self, what: str) -> None:
        self._answer(404, {"kind": "Status", "message": f"{what} not found", "reason": "NotFound", "code": 404})

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _resources(version: str) -> dict[str, Any]:
    verbs = ["get", "list", "patch", "delete"]
    kinds = [
        {"name": plural, "singularName": "", "kind": kind, "namespaced": True, "verbs": verbs}
        for plural, kind in KINDS[version]
    ]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": kinds}


_RAY = {"groupVersion": "ray.io/v1", "version": "v1"}
DISCOVERY: dict[str, dict[str, Any]] = {
    "/version": {"major": "1", "minor": "30", "gitVersion": "v1.30.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/api/v1": _resources("v1"),
    "/apis": {"kind": "APIGroupList", "groups": [{"name": "ray.io", "versions": [_RAY], "preferredVersion": _RAY}]},
    "/apis/ray.io/v1": _resources("ray.io/v1"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stuck", action="store_true")
    parser.add_argument("--fail", action="store_true")
    arguments = parser.parse_args()
    Handler.objects = Objects(stuck=arguments.stuck, fail=arguments.fail)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
