"""The spec's `launch` section: which machines there are and how they are reached. Values only."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from megatoken.cluster.spec.model import SpecPart

# Ray takes node labels of this form only (ray._private.label_utils), which Kubernetes label values have too.
LABEL_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"
HOST_PATTERN = r"^[A-Za-z0-9:]([A-Za-z0-9.:_-]{0,252}[A-Za-z0-9])?$"
NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
PATH_PATTERN = r"^[A-Za-z0-9_./~+@%=,:-]+$"
ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
DEFAULT_IMAGE = "megatoken:latest"
DEFAULT_PREFIX = "/opt/megatoken"
_LABEL, _ENV = re.compile(LABEL_PATTERN), re.compile(ENV_NAME)


def _check_env(env: dict[str, str]) -> dict[str, str]:
    for name, value in env.items():
        if not _ENV.match(name):
            raise ValueError(f"{name!r} is not allowed; letters, digits and _")
        if "\n" in value or "\0" in value:
            raise ValueError(f"the value of {name} is not allowed to hold a line break")
    return env


class DeviceGroup(SpecPart):
    """The devices of one machine, or of every machine of a group."""

    device_kind: str = Field("", description='e.g. "mi355x", "h200"; empty: what Ray finds, or CPU slots')
    gpus: int | None = Field(None, ge=0, le=1024, description="GPUs that Ray may use; unset: those it finds")
    cpu_devices: int = Field(0, ge=0, le=4096, description="CPU slots, one rank each, on a machine without GPUs")
    device_memory_gib: float = Field(0.0, ge=0, le=100_000, description="of each device, for placement; 0: unchecked")
    link_domains: tuple[int, ...] = Field((), description="sizes in device order where links split the node: [4, 4]")
    site: str = Field("", description="where it stands; one link of the throughput sum per site")
    rack: str = Field("", description="failure domain inside the site")
    labels: dict[str, str] = Field(default_factory=dict, description="further node labels, for placement.node_selector")
    env: dict[str, str] = Field(default_factory=dict, description="e.g. NCCL_IB_HCA, HIP_VISIBLE_DEVICES")
    interface: str | None = Field(None, description="for Gloo, NCCL and RCCL; unset: that of the node's address")

    @field_validator("env")
    @classmethod
    def _plain_env(cls, env: dict[str, str]) -> dict[str, str]:
        return _check_env(env)

    @model_validator(mode="after")
    def _labels_are_rays(self) -> Self:
        for name, value in self.node_labels.items():
            if not _LABEL.match(value):
                raise ValueError(
                    f"label {name}: {value!r} is not allowed; up to 63 letters, digits, dashes, dots, underscores"
                )
        return self

    @property
    def node_labels(self) -> dict[str, str]:
        """What the node carries in Ray, where the inventory reads it."""
        found = dict(self.labels)
        for name, value in (("site", self.site), ("rack", self.rack), ("device_kind", self.device_kind)):
            if value:
                found[name] = value
        if self.link_domains:
            found["link_domains"] = "-".join(map(str, self.link_domains))
        if self.device_memory_gib:
            found["device_memory_gib"] = f"{self.device_memory_gib:g}"
        return found


class RayPorts(SpecPart):
    """Ports of Ray's own processes, so that a firewall can be told. Unset ones are chosen by Ray."""

    head: int = Field(6379, ge=1, le=65_535, description="of the head's control store (GCS)")
    node_manager: int | None = Field(None, ge=1, le=65_535, description="of every raylet")
    object_manager: int | None = Field(None, ge=1, le=65_535, description="of every object store")
    workers: tuple[int, int] | None = Field(None, description="first and last port of worker processes")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.workers and not 1 <= self.workers[0] < self.workers[1] <= 65_535:
            raise ValueError(f"workers: {list(self.workers)} is not allowed; [first, last] between 1 and 65535")
        return self


class RedisStore(SpecPart):
    """Where the head's control store (Ray's GCS) keeps what it knows, so that it may end and come back."""

    address: str = Field(
        pattern=r"^(rediss?://)?[A-Za-z0-9._-]+:\d{1,5}$", description="HOST:PORT, or rediss://HOST:PORT for TLS"
    )


class SshHost(DeviceGroup):
    """One machine."""

    host: str = Field(pattern=HOST_PATTERN, description="name or address that ssh connects to")
    address: str = Field("", pattern=HOST_PATTERN + "|^$", description="its address in the cluster; empty: the host")
    user: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$", description="empty: the section's")
    port: int | None = Field(None, ge=1, le=65_535, description="of sshd; unset: the section's")

    @property
    def node_address(self) -> str:
        return self.address or self.host


class SshLaunch(SpecPart):
    """Machines reached by ssh, with Megatoken installed under `prefix` on each. The first host is the head."""

    hosts: tuple[SshHost, ...] = Field(min_length=1, max_length=4096, description="the first is the head")
    user: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$", description="empty: ssh's own choice")
    port: int | None = Field(None, ge=1, le=65_535, description="of sshd; unset: ssh's own choice")
    identity_file: str | None = Field(None, pattern=PATH_PATTERN, description="private key; unset: agent and defaults")
    known_hosts_file: str | None = Field(None, pattern=PATH_PATTERN, description="unset: ssh's own. Keys are checked")
    connect_timeout_s: int = Field(10, ge=1, le=600, description="limit on reaching a host")
    start_timeout_s: float = Field(120.0, gt=0, le=3600, description="limit on Ray's start on a host")
    parallel: int = Field(32, ge=1, le=512, description="hosts worked on at once")
    prefix: str = Field(DEFAULT_PREFIX, pattern=PATH_PATTERN, description="virtual environment on every host")
    directory: str = Field("~/.megatoken", pattern=PATH_PATTERN, description="token, logs and pid files on every host")

    @field_validator("hosts")
    @classmethod
    def _once(cls, hosts: tuple[SshHost, ...]) -> tuple[SshHost, ...]:
        for field in ("host", "node_address"):
            for name, times in Counter((getattr(host, field), host.port) for host in hosts).items():
                if times > 1:
                    raise ValueError(f"{name[0]!r} is given {times} times; a machine is one host")
        return hosts


class SlurmLaunch(DeviceGroup):
    """One Slurm job: a supervised Ray on every node of it, the controller on the first."""

    nodes: int = Field(ge=1, le=10_000, description="nodes of the job")
    partition: str = Field("", pattern=r"^[A-Za-z0-9_.,-]*$", description="empty: the cluster's default")
    account: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$", description="empty: the user's default")
    time: str = Field(
        "1-00:00:00", pattern=r"^(\d+-)?\d{1,3}(:\d{2}){0,2}$|^UNLIMITED$", description="limit of the job"
    )
    cpus_per_task: int | None = Field(None, ge=1, le=4096, description="unset: the whole node, by --exclusive")
    gpus_per_node: int | None = Field(None, ge=0, le=64, description="what Slurm is asked for; unset: `gpus`")
    constraint: str = Field("", pattern=r"^[A-Za-z0-9_.&|*\[\]-]*$", description="node features")
    setup: tuple[str, ...] = Field((), description='lines before the start, e.g. "module load rocm/7.0"')
    prefix: str = Field(DEFAULT_PREFIX, pattern=PATH_PATTERN, description="virtual environment on every node")
    wait_s: int = Field(300, ge=30, le=3600, description="limit on all nodes joining")

    @field_validator("time", mode="before")
    @classmethod
    def _as_slurm_writes_it(cls, time: Any) -> Any:
        """YAML reads an unquoted 12:00:00 as a number of seconds."""
        if isinstance(time, int) and not isinstance(time, bool):
            minutes, seconds = divmod(time, 60)
            return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
        return time


class PodGroup(DeviceGroup):
    """Equal worker pods."""

    name: str = Field(pattern=NAME_PATTERN, description="lower case, digits and dashes")
    pods: int = Field(ge=0, le=10_000, description="how many")
    device_resource: str = Field("", pattern=r"^[A-Za-z0-9./-]*$", description='"amd.com/gpu" or "nvidia.com/gpu"')
    cpu: str = Field("8", pattern=r"^\d+m?$", description="CPUs of a pod")
    memory: str = Field("64Gi", pattern=r"^\d+(Ki|Mi|Gi|Ti)$", description="memory of a pod")
    shm: str = Field("16Gi", pattern=r"^\d+(Mi|Gi)$", description="size of /dev/shm; counts as memory")
    image: str = Field("", description="empty: the section's")
    node_selector: dict[str, str] = Field(default_factory=dict, description="Kubernetes node labels")
    tolerations: tuple[dict[str, Any], ...] = Field((), description="as Kubernetes has them")
    resources: dict[str, str] = Field(default_factory=dict, description='further limits, e.g. {"rdma/hca": "1"}')

    @model_validator(mode="after")
    def _has_devices(self) -> Self:
        if bool(self.gpus) != bool(self.device_resource):
            raise ValueError(f"{self.name}: gpus and device_resource belong together; give both or neither")
        return self


class KubeRayLaunch(SpecPart):
    """A RayCluster for the KubeRay operator (1.5.1 or later, for token authentication)."""

    namespace: str = Field("default", pattern=NAME_PATTERN, description="where everything goes")
    image: str = Field(DEFAULT_IMAGE, min_length=1, description="built from deploy/containers")
    image_pull_policy: str = Field("IfNotPresent", pattern="^(Always|IfNotPresent|Never)$", description="as usual")
    image_pull_secrets: tuple[str, ...] = Field((), description="names of secrets")
    head: PodGroup = Field(
        PodGroup(name="head", pods=1, cpu="4", memory="16Gi", shm="2Gi"), description="control plane, router and edge"
    )
    workers: tuple[PodGroup, ...] = Field(min_length=1, max_length=64, description="where replicas run")
    host_network: bool = Field(False, description="for RDMA without a device plugin of its own")
    models_claim: str | None = Field(None, pattern=NAME_PATTERN, description="volume claim with weights, at /models")
    service_type: str = Field("ClusterIP", pattern="^(ClusterIP|NodePort|LoadBalancer)$", description="of the edge")

    @field_validator("workers")
    @classmethod
    def _names_once(cls, workers: tuple[PodGroup, ...]) -> tuple[PodGroup, ...]:
        for name, times in Counter(group.name for group in workers).items():
            if times > 1:
                raise ValueError(f"the group {name!r} is given {times} times")
        return workers


class ComposeLaunch(DeviceGroup):
    """Containers on one machine: a head, and `nodes` that serve."""

    nodes: int = Field(2, ge=1, le=64, description="containers beside the head")
    image: str = Field(DEFAULT_IMAGE, min_length=1, description="built from deploy/containers")
    shm: str = Field("2gb", pattern=r"^\d+(mb|gb)$", description="size of /dev/shm in each")
    models: str | None = Field(None, pattern=PATH_PATTERN, description="directory with weights, at /models")


class LaunchSpec(SpecPart):
    """How machines are brought up. Several ways may stand beside each other; `render` takes one."""

    ports: RayPorts = RayPorts()
    redis: RedisStore | None = Field(None, description="for ssh and Slurm; none: the head's memory")
    ssh: SshLaunch | None = Field(None, description="machines reached by ssh")
    slurm: SlurmLaunch | None = Field(None, description="a Slurm job")
    kuberay: KubeRayLaunch | None = Field(None, description="a RayCluster on Kubernetes")
    compose: ComposeLaunch | None = Field(None, description="containers on one machine")
