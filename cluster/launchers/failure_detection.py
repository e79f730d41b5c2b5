"""How fast Ray notices a lost node and how fast a cut-off node ends itself: the same on whatever way Ray is started.

The two must fit each other. The head takes a silent node for dead 4-5 s after the cut and its replicas are replaced
elsewhere; the node, which cannot know that, ends its own Ray and all its replicas about 11 s after it (both measured
between network namespaces). By Ray's defaults the head needs over a minute, and the cut-off node was still serving
when we stopped watching after 75 s. The names are those of Ray 2.60 (ray_config_def.h) with RAY_ before them; Ray reads
them from the environment of `ray start`, and its processes inherit them. A local cluster has no link to lose and keeps
Ray's defaults, which forgive a machine that is briefly too busy to answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FAILURE_DETECTION: Mapping[str, str] = MappingProxyType(
    {
        # The head asks each node for its health: first after the delay, then every period; so many answers in a row
        # that take longer than the timeout mean that the node is dead.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        # Every gRPC connection that Ray opens: a ping each so long, and how long its answer may take. Nothing else
        # tells a node that its connection to the head leads nowhere.
        "RAY_grpc_client_keepalive_time_ms": "2000",
        "RAY_grpc_client_keepalive_timeout_ms": "3000",
        # How long a node tries to reach the head again before it ends itself; Ray's own is 60 s.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    }
)
