"""A client that knows no .proto calls a router by reflection alone, as grpcurl does."""

from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.support.processes import Processes


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    """A channel to a router over one worker with the simulated engine."""
    with Processes() as processes:
        counters = str(tmp_path_factory.mktemp("counters"))
        worker = processes.start(
            "worker",
            {"replica": "r1", "model": "m", "engine": "simulated", "simulated": {}, "counters_dir": counters},
        )
        member = {
            "replica": "r1",
            "model": "m",
            "address": worker.address,
            "incarnation": str(worker.ready["incarnation"]),
            "phase": "REPLICA_PHASE_READY",
            "maxModelLen": worker.ready["max_model_len"],
            "vocabSize": worker.ready["vocab_size"],
        }
        snapshot = {"epoch": "1", "version": "1", "replicas": [member], "models": [{"model": "m", "replicasReady": 1}]}
        router = processes.start("router", {"router": "router-1", "static_snapshot": snapshot})
        with grpc.insecure_channel(router.address) as channel:
            yield channel


def test_services_and_methods_are_found_and_called_without_a_proto(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    services = set(database.get_services())
    assert {"megatoken.v1.Tokens", "megatoken.v1.Router", "grpc.health.v1.Health"} <= services
    method = DescriptorPool(database).FindServiceByName("megatoken.v1.Tokens").methods_by_name["Generate"]
    request = ParseDict(
        {"model": "m", "prompt": [1, 2, 3], "sampling": {"maxTokens": 5, "ignoreEos": True}},
        GetMessageClass(method.input_type)(),
    )
    answer = GetMessageClass(method.output_type)
    call = channel.unary_stream(
        "/megatoken.v1.Tokens/Generate",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=answer.FromString,
    )
    responses = [MessageToDict(response) for response in call(request, timeout=30)]
    assert sum(len(response.get("tokens", [])) for response in responses) == 5
    assert responses[-1]["finish"]["reason"] == "FINISH_REASON_LENGTH"
