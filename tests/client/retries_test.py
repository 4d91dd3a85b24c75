"""Repeats: against a server that starts late, and one that refuses as often as it is told to."""

import concurrent.futures
import contextlib
import socket
import threading
import time

import grpc
import longspan
import numpy
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from longspan.v1 import attention_pb2, attention_pb2_grpc, server_pb2, server_pb2_grpc
from server import Server


def status(code, delay_ms=None):
    message = status_pb2.Status(code=code.value[0], message="not now")
    if delay_ms is not None:
        detail = any_pb2.Any()
        delay = duration_pb2.Duration(nanos=delay_ms * 1_000_000)
        detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        message.details.append(detail)
    return message


class Refusing(server_pb2_grpc.ServerServiceServicer, attention_pb2_grpc.AttentionServiceServicer):
    """Refuses with the statuses it is given, then answers."""

    def __init__(self):
        self.refusals = []
        self.times = []

    def GetCapabilities(self, request, context):
        self.times.append(time.monotonic())
        if self.refusals:
            refusal = self.refusals.pop(0)
            context.set_trailing_metadata(
                [("grpc-status-details-bin", refusal.SerializeToString())]
            )
            code = next(c for c in grpc.StatusCode if c.value[0] == refusal.code)
            context.abort(code, refusal.message)
        return server_pb2.GetCapabilitiesResponse(server_version="7")

    def Decode(self, request, context):
        """Each item's layer is how often it is refused before."""
        self.times.append([item.layer for item in request.items])
        response = attention_pb2.DecodeResponse()
        for item in request.items:
            result = response.results.add(output=item.query)
            seen = sum(item.layer in layers for layers in self.times)
            if seen <= item.layer:
                result.status.CopyFrom(status(grpc.StatusCode.RESOURCE_EXHAUSTED, 1))
        return response


@pytest.fixture
def refusing():
    servicer = Refusing()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
    server_pb2_grpc.add_ServerServiceServicer_to_server(servicer, server)
    attention_pb2_grpc.add_AttentionServiceServicer_to_server(servicer, server)
    servicer.address = f"localhost:{server.add_insecure_port('localhost:0')}"
    server.start()
    yield servicer
    server.stop(None).wait()


def test_a_refused_call_is_repeated_after_the_servers_delay(refusing):
    refusing.refusals = [
        status(grpc.StatusCode.RESOURCE_EXHAUSTED, 150),
        status(grpc.StatusCode.UNAVAILABLE),
        status(grpc.StatusCode.ABORTED, 1),
    ]
    with longspan.Client(refusing.address) as client:
        assert client.capabilities().server_version == "7"
    assert len(refusing.times) == 4
    assert refusing.times[1] - refusing.times[0] >= 0.15


@pytest.mark.parametrize(
    "refusal",
    [
        # Without a delay it will not help to wait.
        status(grpc.StatusCode.RESOURCE_EXHAUSTED),
        status(grpc.StatusCode.FAILED_PRECONDITION),
        status(grpc.StatusCode.ABORTED),
    ],
)
def test_what_will_not_pass_is_not_repeated(refusing, refusal):
    refusing.refusals = [refusal]
    with longspan.Client(refusing.address) as client, pytest.raises(longspan.Error) as caught:
        client.capabilities()
    assert caught.value.code.value[0] == refusal.code
    assert len(refusing.times) == 1


def test_repeats_end_when_time_is_up(refusing):
    refusing.refusals = [status(grpc.StatusCode.UNAVAILABLE, 40)] * 1000
    with (
        longspan.Client(refusing.address, retry_for=0.2) as client,
        pytest.raises(longspan.Error) as caught,
    ):
        client.capabilities()
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE
    assert caught.value.retry_delay == pytest.approx(0.04)
    assert 2 <= len(refusing.times) <= 6


def test_only_the_refused_items_of_a_batch_are_repeated(refusing):
    with longspan.Client(refusing.address) as client:
        context = client.context("any")
        query = numpy.ones((1, 1, 4), dtype=numpy.float32)
        items = [longspan.DecodeItem(context, layer, query * layer) for layer in (0, 2, 1)]
        answers = client.decode(items)
    assert refusing.times == [[0, 2, 1], [2, 1], [2]]
    assert [answer.output[0, 0, 0] for answer in answers] == [0, 2, 1]


def test_a_server_that_starts_late_is_waited_for():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as reserved:
        port = reserved.getsockname()[1]
    started = []
    tried = threading.Event()

    def start():
        tried.wait()
        started.append(Server("--port", port))

    thread = threading.Thread(target=start)
    thread.start()
    try:
        with longspan.Client(f"127.0.0.1:{port}", retry_for=0) as impatient:
            with pytest.raises(longspan.Error) as caught:
                impatient.capabilities()
            assert caught.value.code == grpc.StatusCode.UNAVAILABLE
        tried.set()
        with longspan.Client(f"127.0.0.1:{port}", retry_for=60) as patient:
            assert patient.capabilities().num_ranks == 1
    finally:
        tried.set()
        thread.join()
        for server in started:
            server.terminate()
