"""Clients that die, never read, never write, or send garbage: others are served, memory stays
bounded, and what was half-sent is forgotten."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import grpc
import numpy
import pytest
from longspan.v1 import attention_pb2 as attention

from calls import (
    DIM,
    KV_HEADS,
    append_requests,
    chunk,
    fp32,
    item,
    query_of,
    refused,
    spec_of,
)
from metrics import scrape, value_of

Code = grpc.StatusCode
HERE = pathlib.Path(__file__).resolve().parent


def raw_call(stubs, path, kind):
    """A method of the channel that takes and gives bytes."""
    return getattr(stubs.channel, kind)(
        path, request_serializer=lambda data: data, response_deserializer=lambda data: data
    )


UNARY = [
    "/longspan.v1.AttentionService/Decode",
    "/longspan.v1.IntrospectService/Explain",
    "/longspan.v1.ContextService/CreateContext",
    "/longspan.v1.ContextService/GetContext",
    "/longspan.v1.ContextService/ListContexts",
    "/longspan.v1.ContextService/DeleteContext",
    "/longspan.v1.ContextService/ForkContext",
    "/longspan.v1.ContextService/TruncateContext",
    "/longspan.v1.ServerService/GetCapabilities",
    "/longspan.v1.ServerService/CheckSpec",
]
STREAMS = [
    ("/longspan.v1.AttentionService/Append", "stream_unary"),
    ("/longspan.v1.AttentionService/Prefill", "stream_stream"),
    ("/longspan.v1.AttentionService/DecodeStream", "stream_stream"),
    ("/longspan.v1.ContextService/KeepAlive", "stream_stream"),
]
GARBAGE = b"\x0a\xff\xff\xff\xff\x0f no message"


@pytest.mark.parametrize("path", UNARY)
def test_bytes_that_are_no_message(stubs, path):
    with refused(Code.INVALID_ARGUMENT) as found:
        raw_call(stubs, path, "unary_unary")(GARBAGE)
    assert found[0].reason == "MALFORMED"


@pytest.mark.parametrize("path, kind", STREAMS)
def test_bytes_that_are_no_message_on_a_stream(stubs, path, kind):
    with refused(Code.INVALID_ARGUMENT) as found:
        answer = raw_call(stubs, path, kind)(iter([GARBAGE]))
        if kind == "stream_stream":
            list(answer)
    assert found[0].reason == "MALFORMED"


def test_a_garbled_message_is_not_taken_for_the_end_of_an_append(stubs, rng):
    made = stubs.create()
    rows = rng.standard_normal((5, KV_HEADS, DIM), numpy.float32)
    messages = [
        request.SerializeToString()
        for request in append_requests(made.context_id, [chunk(0, 0, rows, rows)])
    ]
    append = raw_call(stubs, "/longspan.v1.AttentionService/Append", "stream_unary")
    with refused(Code.INVALID_ARGUMENT):
        append(iter(messages + [GARBAGE]))
    assert list(stubs.get(made.context_id).layer_lengths) == [0, 0]


def test_mutated_messages_never_kill_the_server(stubs, rng):
    made = stubs.create()
    stubs.fill(rng, made.context_id, 8)
    request = attention.DecodeRequest(items=[item(made.context_id, query_of(rng))])
    valid = numpy.frombuffer(request.SerializeToString(), numpy.uint8)
    decode = raw_call(stubs, UNARY[0], "unary_unary")
    outcomes = set()
    for _ in range(300):
        mutated = valid.copy()
        for _ in range(int(rng.integers(1, 4))):
            mutated[rng.integers(0, min(len(mutated), 80))] = rng.integers(0, 256)
        try:
            decode(mutated[: rng.integers(1, len(mutated) + 1)].tobytes())
            outcomes.add(None)
        except grpc.RpcError as error:
            outcomes.add(error.code())
    assert outcomes <= {None, Code.INVALID_ARGUMENT}
    assert not stubs.decode_one(item(made.context_id, query_of(rng))).HasField("status")


def test_garbage_instead_of_http2(server, stubs, rng):
    host, port = server.address.rsplit(":", 1)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for prefix in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", preface, preface + bytes(9)):
        for _ in range(10):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                try:
                    connection.sendall(prefix + rng.bytes(4096))
                    while connection.recv(65536):
                        pass
                except (ConnectionError, TimeoutError):
                    pass
    assert stubs.create().context_id
    assert server.process.poll() is None


DYING = """
import os, signal, sys
import numpy
sys.path.insert(0, {here!r})
from calls import Stubs, append_requests, chunk
stubs = Stubs({address!r})
rows = numpy.ones((2048, 2, 64), numpy.float32)
def requests():
    position = 0
    yield from append_requests({context_id!r}, [])
    while True:
        yield from list(append_requests("", [chunk(0, position, rows, rows)]))[1:]
        position += len(rows)
        if position == 4 * len(rows):
            print("appending", flush=True)
stubs.attention.Append(requests())
"""


def test_a_client_that_dies_in_an_append(stubs, server, rng):
    for _ in range(5):
        victim = stubs.create()
        code = DYING.format(here=str(HERE), address=server.address, context_id=victim.context_id)
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"appending\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        rows = rng.standard_normal((3, KV_HEADS, DIM), numpy.float32)
        for _ in range(2000):
            try:
                answer = stubs.append(victim.context_id, [chunk(0, 0, rows, rows)])
                break
            except grpc.RpcError as error:
                assert error.code() == Code.ABORTED
                threading.Event().wait(0.005)
        assert list(answer.layer_lengths) == [3, 0]
        assert not stubs.decode_one(item(victim.context_id, query_of(rng))).HasField("status")


def resident_bytes(process):
    fields = pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGESIZE")


def test_a_client_that_never_reads(start, connect, rng):
    """Its answers are bounded by the window, and after a while it is thrown out."""
    process = start("--stall-timeout", "500ms", "--lease-check-interval", "50ms")
    stubs = connect(process.address)
    made = stubs.create(spec_of(num_query_heads=256, key_head_dim=128))
    rows = rng.standard_normal((64, KV_HEADS, 128), numpy.float32)
    stubs.append(made.context_id, [chunk(0, 0, rows, rows)])
    before = resident_bytes(process.process)
    query = rng.standard_normal((64, 256, 128), numpy.float32)
    message = attention.DecodeStreamRequest(
        step=attention.DecodeStreamRequest.Step(
            items=[attention.DecodeItem(context_id=made.context_id, query=fp32(query))]
        )
    )

    def requests():
        yield attention.DecodeStreamRequest(
            open=attention.DecodeStreamRequest.Open(context_ids=[made.context_id])
        )
        for seq in range(200):  # 8 MiB each, and as much back
            message.step.seq = seq
            yield message

    lazy = connect(process.address)
    answers = lazy.attention.DecodeStream(requests())  # never iterated
    other = item(made.context_id, query[:1])
    ended = dict(op="DecodeStream", code="DEADLINE_EXCEEDED", tenant="default")
    while value_of(scrape(process), "longspan_requests_total", **ended) == 0:
        assert not stubs.decode_one(other).HasField("status")
        assert resident_bytes(process.process) - before < 1 << 30
    answers.cancel()


def test_an_append_whose_client_falls_silent(start, connect, rng):
    process = start("--append-deadline", "300ms", "--lease-check-interval", "50ms")
    stubs = connect(process.address)
    made = stubs.create()
    rows = rng.standard_normal((3, KV_HEADS, DIM), numpy.float32)
    never = threading.Event()

    def requests():
        yield from append_requests(made.context_id, [chunk(0, 0, rows, rows)])
        never.wait(60)

    try:
        with refused(Code.DEADLINE_EXCEEDED):
            stubs.attention.Append(requests())
    finally:
        never.set()
    assert list(stubs.append(made.context_id, [chunk(0, 0, -rows, rows)]).layer_lengths) == [3, 0]


def test_a_stream_that_is_opened_and_forgotten_holds_nothing_up(start, connect):
    """Open streams do not keep a server from ending."""
    process = start("--drain-timeout", "20s")
    stubs = connect(process.address)
    made = stubs.create()
    never = threading.Event()

    def requests():
        yield attention.DecodeStreamRequest(
            open=attention.DecodeStreamRequest.Open(context_ids=[made.context_id])
        )
        never.wait(60)

    try:
        answers = stubs.attention.DecodeStream(requests())
        assert next(answers).opened.window
        assert process.terminate(timeout=15) == 0
        with refused(Code.UNAVAILABLE) as found:
            next(answers)
        assert found[0].reason == "DRAINING" and found[0].retry_seconds > 0
    finally:
        never.set()
