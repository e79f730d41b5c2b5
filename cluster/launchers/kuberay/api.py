"""What `megatoken up` asks of a Kubernetes API server, through the `kubernetes` package: apply, look, delete.

The package is an extra (`megatoken[kubernetes]`). The server and who we are come from a kubeconfig or from the pod
that this runs in, as for kubectl.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

MANAGER: Final = "megatoken"  # of the fields that are applied
CLUSTER_LABEL: Final = "ray.io/cluster"  # KubeRay's, on every pod of a RayCluster
MAX_TEXT: Final = 400


class KubernetesError(Exception):
    """There is no API server, it does not answer, or it refuses: one sentence, with what it said."""


class Kubernetes:
    """One namespace of one API server. Every method raises KubernetesError."""

    def __init__(self, namespace: str) -> None:
        try:
            import kubernetes
        except ImportError:
            how = "pip install 'megatoken[kubernetes]'"
            raise KubernetesError(f"launch.kuberay needs the package kubernetes: {how}") from None
        self.namespace = namespace
        self._refused: type[Exception] = kubernetes.client.exceptions.ApiException
        try:
            kubernetes.config.load_config()
        except kubernetes.config.ConfigException as error:
            what = "no Kubernetes cluster is configured, kubectl must work here"
            raise KubernetesError(f"{what}: {_line(error)}") from None
        self._client = kubernetes.client.ApiClient()
        self._objects = self._call("its API", lambda: kubernetes.dynamic.DynamicClient(self._client))

    def apply(self, document: Mapping[str, Any]) -> None:
        """Creates the object, or makes it what the document says (server-side apply)."""
        resource = self._resource(document["apiVersion"], document["kind"])
        options = {"namespace": self.namespace, "field_manager": MANAGER, "force_conflicts": True}
        what = f"{document['kind']} {document['metadata']['name']}"
        self._call(what, lambda: resource.server_side_apply(body=dict(document), **options))

    def delete(self, document: Mapping[str, Any]) -> None:
        """Removes the object and what belongs to it; one that is gone is well."""
        resource = self._resource(document["apiVersion"], document["kind"])
        name = document["metadata"]["name"]
        options = {"namespace": self.namespace, "propagation_policy": "Foreground"}
        self._call(f"{document['kind']} {name}", lambda: resource.delete(name=name, **options), missing=None)

    def look(self, document: Mapping[str, Any]) -> dict[str, Any] | None:
        """The object as it is now; None when there is none."""
        resource = self._resource(document["apiVersion"], document["kind"])
        name = document["metadata"]["name"]
        found = self._call(
            f"{document['kind']} {name}", lambda: resource.get(name=name, namespace=self.namespace), missing=None
        )
        return None if found is None else dict(found.to_dict())

    def pods(self, cluster: str) -> Sequence[Mapping[str, Any]]:
        """The pods of a RayCluster."""
        resource = self._resource("v1", "Pod")
        labelled = {"namespace": self.namespace, "label_selector": f"{CLUSTER_LABEL}={cluster}"}
        found = self._call("its pods", lambda: resource.get(**labelled))
        return [dict(item) for item in found.to_dict()["items"]]

    def answers(self, service: str, port: str, path: str, *, tls: bool) -> bool:
        """Whether a service answers a GET with success, asked through the API server."""
        scheme = "https:" if tls else ""
        url = f"/api/v1/namespaces/{self.namespace}/services/{scheme}{service}:{port}/proxy{path}"
        try:
            self._objects.request("get", url, serialize=False)
        except self._refused:
            return False
        except Exception as error:  # no server, or a broken line: one sentence, whatever the HTTP client calls it
            raise KubernetesError(f"Kubernetes does not answer: {_line(error)}") from None
        return True

    def _resource(self, version: str, kind: str) -> Any:
        return self._call(f"the kind {kind}", lambda: self._objects.resources.get(api_version=version, kind=kind))

    def _call(self, what: str, act: Callable[[], Any], **options: Any) -> Any:
        """`missing`: what to return for an object that is not there; without it that is an error."""
        try:
            return act()
        except self._refused as error:
            if getattr(error, "status", None) == 404 and "missing" in options:
                return options["missing"]
            raise KubernetesError(f"Kubernetes refuses {what}: {_reason(error)}") from None
        except Exception as error:
            raise KubernetesError(f"Kubernetes does not answer for {what}: {_line(error)}") from None


def _reason(error: Any) -> str:
    """The API server's own sentence."""
    try:
        said = json.loads(error.body)["message"]
    except (ValueError, TypeError, KeyError):
        said = error.reason
    return f"{error.status} {said}"[:MAX_TEXT]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:MAX_TEXT]
