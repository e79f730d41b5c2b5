"""torch.distributed behind three calls: connect, gather and all-reduce. The only importer of torch in this package.

A group uses one backend object directly and never the default group, so it shares no state with a model's own groups
and needs no environment variables. Every call has a deadline and raises CollectiveError.

With more than one group label an all-reduce is three steps: within the group, across the groups' first ranks, and a
broadcast back into the group. Where groups are sites, a round trip between sites is paid per site and not per rank.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

EAGER_RANKS: Final = 16  # up to this many, every pair connects at once and a bad link shows while forming
Vector = npt.NDArray[np.int64]


class CollectiveError(Exception):
    """The group failed. `reason` is one of timeout, peer_lost, store, backend, other; `suspects` are ranks."""

    def __init__(self, message: str, reason: str, suspects: list[int] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.suspects = suspects or []

    def facts(self) -> dict[str, Any]:
        """For the agent."""
        return {"message": str(self), "reason": self.reason, "suspects": self.suspects}


def usable_backends() -> list[str]:
    """What this node's torch and devices can reduce with, fastest first. Starts the device runtime: call in a child."""
    found = []
    if torch.cuda.is_available() and hasattr(dist, "ProcessGroupNCCL"):
        found.append("nccl/rocm" if torch.version.hip else "nccl/cuda")
    if dist.is_gloo_available():
        found.append("gloo")
    return found


class ProcessGroup:
    """One epoch's ranks, connected. `facts`: epoch, rank, groups (hierarchy.reduction_groups: one label a rank),
    backend, device, store (host, port), host or interface to bind, timeout_s."""

    def __init__(self, facts: dict[str, Any], store_listener: int) -> None:
        self._epoch, self._rank, self._labels = facts["epoch"], facts["rank"], facts["groups"]
        self._size = len(self._labels)
        self._facts = facts
        self._timeout_s: float = facts["timeout_s"]
        self._device = "cpu"
        try:
            self._store = self._open_store(store_listener)
            self._store.set(f"{self._epoch}/arrived/{self._rank}", "1")
        except RuntimeError as error:
            suspects = [] if self._rank == 0 else [0]
            raise CollectiveError(f"rendezvous store: {first_line(error)}", "store", suspects) from error
        try:
            self._connect()
            self._store.set(f"{self._epoch}/connected/{self._rank}", "1")
        except RuntimeError as error:
            raise CollectiveError(f"connecting: {first_line(error)}", reason_of(error), self._missing()) from error

    def gather(self, blob: bytes) -> list[bytes]:
        """Every rank's blob, in rank order."""
        lengths = np.zeros(self._size, np.int64)
        lengths[self._rank] = len(blob)
        lengths = self.all_reduce(lengths, self._timeout_s)
        start, end = int(lengths[: self._rank].sum()), int(lengths.sum())
        words = np.zeros(-(-end // 8), np.int64)  # one sum of int64 serves here too: no two ranks write the same byte
        words.view(np.uint8)[start : start + len(blob)] = np.frombuffer(blob, np.uint8)
        content = self.all_reduce(words, self._timeout_s).tobytes()
        bounds = np.concatenate(([0], np.cumsum(lengths))).tolist()
        return [content[bounds[rank] : bounds[rank + 1]] for rank in range(self._size)]

    def all_reduce(self, vector: Vector, timeout_s: float) -> Vector:
        """The sum of every rank's vector."""
        tensor = torch.from_numpy(vector.copy()).to(self._device)
        timeout = timedelta(seconds=timeout_s)
        reduce_options = dist.AllreduceOptions()
        reduce_options.reduceOp, reduce_options.timeout = dist.ReduceOp.SUM, timeout
        try:
            self._wait(self._inner.allreduce([tensor], reduce_options), timeout)
            if self._outer is not None:
                self._wait(self._outer.allreduce([tensor], reduce_options), timeout)
            if self._hierarchical:
                options = dist.BroadcastOptions()
                options.rootRank, options.rootTensor, options.timeout = 0, 0, timeout
                self._wait(self._inner.broadcast([tensor], options), timeout)
            return tensor.cpu().numpy()
        except RuntimeError as error:
            raise CollectiveError(f"all-reduce: {first_line(error)}", reason_of(error)) from error

    def _wait(self, work: Any, timeout: timedelta) -> None:
        work.wait(timeout)
        if self._device != "cpu":
            torch.cuda.synchronize()  # nccl's wait only orders streams; a hang here ends with this process

    def _open_store(self, listener: int) -> Any:
        host, port = self._facts["store"]
        timeout = timedelta(seconds=self._timeout_s)
        if self._rank == 0:  # on the socket that the agent reserved at its start
            return dist.TCPStore(
                host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=os.dup(listener)
            )
        return dist.TCPStore(host, port, None, False, timeout, wait_for_workers=False)

    def _connect(self) -> None:
        own = self._labels[self._rank]
        members = [rank for rank, label in enumerate(self._labels) if label == own]
        leaders = sorted(self._labels.index(label) for label in set(self._labels))
        self._hierarchical = len(leaders) > 1
        self._outer = None
        if self._hierarchical and self._rank in leaders:
            self._outer = self._group("leaders", leaders)
        self._inner = self._group(f"group/{members[0]}", members)

    def _group(self, name: str, members: list[int]) -> Any:
        store = dist.PrefixStore(f"{self._epoch}/{name}", self._store)
        rank, size = members.index(self._rank), len(members)
        return self._nccl(store, rank, size) if self._facts["backend"] == "nccl" else self._gloo(store, rank, size)

    def _gloo(self, store: Any, rank: int, size: int) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=self._timeout_s)
        options._threads = 1
        lazy = size > EAGER_RANKS
        if self._facts["interface"]:
            device = dist.ProcessGroupGloo.create_device(interface=self._facts["interface"], lazy_init=lazy)
        else:
            device = dist.ProcessGroupGloo.create_device(hostname=self._facts["host"], lazy_init=lazy)
        options._devices = [device]
        return dist.ProcessGroupGloo(store, rank, size, options)

    def _nccl(self, store: Any, rank: int, size: int) -> Any:
        # One channel and the smallest buffers: the sum must not take memory or compute units from the model.
        settings = {"NCCL_MAX_CTAS": "1", "NCCL_MIN_CTAS": "1", "NCCL_MAX_NCHANNELS": "1", "NCCL_MIN_NCHANNELS": "1"}
        settings |= {"NCCL_BUFFSIZE": "65536", "NCCL_P2P_NET_CHUNKSIZE": "65536", "NCCL_PROTO": "LL"}
        if self._facts["interface"]:
            settings["NCCL_SOCKET_IFNAME"] = self._facts["interface"]
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        torch.cuda.set_device(self._facts["device"])
        self._device = f"cuda:{self._facts['device']}"
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._timeout_s)
        options.is_high_priority_stream = False
        return dist.ProcessGroupNCCL(store, rank, size, options)

    def _missing(self) -> list[int]:
        """Ranks that did not arrive at the store, or else those that arrived and could not connect."""
        try:
            for stage in ("arrived", "connected"):
                missing = [r for r in range(self._size) if not self._store.check([f"{self._epoch}/{stage}/{r}"])]
                if missing:
                    return missing
        except RuntimeError:
            return [0] if self._rank else []
        return []


def reason_of(error: RuntimeError) -> str:
    """timeout, peer_lost or other, from the text of a native error: they have no types of their own."""
    text = str(error).lower()
    if "timed out" in text or "timeout" in text:
        return "timeout"
    return "peer_lost" if any(word in text for word in ("closed", "reset", "refused", "broken pipe")) else "other"


def first_line(error: RuntimeError) -> str:
    """The error without its native stack."""
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
