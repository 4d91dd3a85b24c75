"""What operators and generic tools see: reflection, health, metrics, log, deadlines, shutdown."""

import concurrent.futures
import json
import re
import signal
import subprocess
import threading

import grpc
import numpy
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from longspan.v1 import (
    attention_pb2 as attention,
    context_pb2 as context_messages,
    introspect_pb2 as introspect,
    server_pb2 as server_messages,
)

from calls import (
    block_method,
    details_of,
    failed,
    fp32,
    item,
    query_of,
    refused,
    spec_of,
)
from metrics import scrape, value_of
from server import Server, binary

Code = grpc.StatusCode


def generic_call(channel, service_name, method_name, request):
    """A unary call by a client that has no generated code: descriptors come from reflection."""
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    method = pool.FindServiceByName(service_name).FindMethodByName(method_name)
    request_type = message_factory.GetMessageClass(method.input_type)
    response_type = message_factory.GetMessageClass(method.output_type)
    call = channel.unary_unary(
        f"/{service_name}/{method_name}",
        request_serializer=request_type.SerializeToString,
        response_deserializer=response_type.FromString,
    )
    return call(request_type(**request))


def test_a_generic_client_finds_everything(stubs):
    names = set(ProtoReflectionDescriptorDatabase(stubs.channel).get_services())
    ours = {"Attention", "Context", "Introspect", "Server"}
    assert {f"longspan.v1.{name}Service" for name in ours} <= names
    assert "grpc.health.v1.Health" in names
    answer = generic_call(stubs.channel, "longspan.v1.ServerService", "GetCapabilities", {})
    assert answer.num_ranks == 2 and answer.methods
    made = generic_call(
        stubs.channel,
        "longspan.v1.ContextService",
        "CreateContext",
        {"spec": dict(num_layers=1, num_query_heads=2, num_kv_heads=1, key_head_dim=64)},
    )
    assert made.context.context_id
    health = generic_call(
        stubs.channel,
        "grpc.health.v1.Health",
        "Check",
        {"service": "longspan.v1.AttentionService"},
    )
    assert health.status == 1


def test_health(stubs):
    health = health_pb2_grpc.HealthStub(stubs.channel)
    for service in ("", "longspan.v1.AttentionService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as error:
        health.Check(health_pb2.HealthCheckRequest(service="nosuch"))
    assert error.value.code() == Code.NOT_FOUND


def eventually(condition, attempts=500):
    for _ in range(attempts):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError("it never came true")


def test_metrics_count_what_happened(start, connect, rng):
    process = start("--ranks", 2, "--lease-check-interval", "20ms")
    stubs = connect(process.address)
    layout = context_messages.Layout(stripe_tokens=64)
    made = stubs.create(spec_of(methods=[block_method("quest")], layout=layout))
    stubs.fill(rng, made.context_id, 1000)
    query = query_of(rng)
    for _ in range(5):
        stubs.decode_one(item(made.context_id, query))
    stubs.introspect.Explain(
        introspect.ExplainRequest(
            context_id=made.context_id, query=fp32(query), compare_with_dense=True
        )
    )
    with refused(Code.NOT_FOUND):
        stubs.get("nosuch")
    samples = scrape(process)

    def count(name, **labels):
        return value_of(samples, name, **labels)

    tenant = "default"
    assert count("longspan_requests_total", op="Decode", code="OK", tenant=tenant) == 5
    assert count("longspan_requests_total", op="GetContext", code="NOT_FOUND", tenant=tenant) == 1
    assert count("longspan_request_duration_seconds_count", op="Decode") == 5
    assert count("longspan_inflight_requests", op="Decode") == 0
    assert count("longspan_appended_tokens_total", tenant=tenant) == 2000
    assert count("longspan_query_tokens_total", tenant=tenant) == 6
    selected = count("longspan_selected_tokens_total", policy="quest")
    candidates = count("longspan_candidate_tokens_total", policy="quest")
    assert candidates == 6 * 4 * 1000 and 0 < selected < candidates / 2
    assert count("longspan_selection_recall_ratio_count", policy="quest") == 4
    for stage in ("queue", "scatter", "select", "compute", "reduce", "send"):
        assert count("longspan_stage_duration_seconds_count", stage=stage) > 0
    assert count("longspan_contexts", state="ready") == 1
    for name in ("process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"):
        assert count(name) > 0
    assert count("longspan_build_info", version=version(stubs)) == 1
    boundaries = sorted(
        float(dict(labels)["le"])
        for name, labels in samples
        if name == "longspan_request_duration_seconds_bucket" and dict(labels)["op"] == "Decode"
    )
    assert boundaries[0] == 25e-6 and boundaries[-2] == 10 and len(boundaries) == 19

    def memory_is_shown():
        shown = scrape(process)
        used = [value_of(shown, "longspan_kv_bytes", worker=str(i), tier="host") for i in (0, 1)]
        sent = value_of(
            shown, "longspan_comm_bytes_total", transport="in_process", direction="sent"
        )
        return all(used) and sent > 0

    eventually(memory_is_shown)
    labels = {dict(labels).get("policy") for _, labels in scrape(process)}
    assert labels <= {None, "quest"}


def version(stubs):
    return stubs.server.GetCapabilities(server_messages.GetCapabilitiesRequest()).server_version


def test_methods_of_callers_share_one_label(start, connect, rng):
    process = start()
    stubs = connect(process.address)
    made = stubs.create(spec_of(methods=[block_method(f"mine-{i}") for i in range(10)]))
    stubs.fill(rng, made.context_id, 10)
    for i in range(10):
        options = attention.AttentionOptions(method_name=f"mine-{i}")
        stubs.decode_one(item(made.context_id, query_of(rng), options=options))
    policies = {dict(labels).get("policy") for _, labels in scrape(process)}
    assert policies == {None, "other"}


def test_one_json_line_a_request(start, connect):
    process = start("--log-format", "json", "--log-level", "info")
    stubs = connect(process.address)
    trace = "0af7651916cd43dd8448eb211c80319c"
    metadata = [
        ("x-request-id", 'call "7"'),
        ("traceparent", f"00-{trace}-b7ad6b7169203331-01"),
    ]
    with pytest.raises(grpc.RpcError):
        stubs.contexts.GetContext(
            context_messages.GetContextRequest(context_id='no "such"'), metadata=metadata
        )
    stubs.create(context_id="logged")
    assert process.terminate() == 0
    lines = [json.loads(line) for line in process.log if line.startswith("{")]
    requests = [line for line in lines if "op" in line]
    assert [line["op"] for line in requests] == ["GetContext", "CreateContext"]
    refused_line, made_line = requests
    assert refused_line["code"] == "NOT_FOUND" and refused_line["context"] == 'no "such"'
    assert refused_line["trace_id"] == trace and refused_line["request_id"] == "call__7_"
    assert made_line["code"] == "OK" and made_line["context"] == "logged"
    assert all({"time", "level"} <= line.keys() for line in lines)
    assert all(line["duration_ms"] > 0 for line in requests)


BUSY_TOKENS = 16384


def busy_context(stubs, rng):
    made = stubs.create(context_id="busy")
    stubs.fill(rng, made.context_id, BUSY_TOKENS)
    return made.context_id


def slow_item(context_id, rng):
    return item(context_id, query_of(rng, 64))


def test_expired_work_never_runs(start, connect, rng):
    """Queued behind a long step with a short deadline, a write has no effect."""
    process = start("--threads-per-rank", 1, "--lease-check-interval", "10ms")
    stubs = connect(process.address)
    context_id = busy_context(stubs, rng)
    slow = attention.DecodeRequest(items=[slow_item(context_id, rng) for _ in range(40)])
    ongoing = stubs.attention.Decode.future(slow, timeout=100)
    eventually(lambda: value_of(scrape(process), "longspan_queue_depth", op="decode") > 0)
    rows = numpy.ones((1, 2, 64), numpy.float32)
    write = item(
        context_id, query_of(rng), start_pos=BUSY_TOKENS, key=fp32(rows), value=fp32(rows)
    )
    with pytest.raises(grpc.RpcError) as error:
        stubs.attention.Decode(attention.DecodeRequest(items=[write]), timeout=0.002)
    assert error.value.code() == Code.DEADLINE_EXCEEDED
    assert not any(result.HasField("status") for result in ongoing.result(100).results)
    assert list(stubs.get(context_id).layer_lengths) == [BUSY_TOKENS] * 2


def test_a_deadline_of_the_server_applies_where_the_caller_gives_none(start, connect, rng):
    process = start("--threads-per-rank", 1, "--decode-deadline", "20ms")
    stubs = connect(process.address)
    context_id = busy_context(stubs, rng)
    request = attention.DecodeRequest(items=[slow_item(context_id, rng) for _ in range(30)])
    results = stubs.attention.Decode(request).results
    late = [result for result in results if result.HasField("status")]
    assert late and all(
        failed(result, Code.DEADLINE_EXCEEDED).reason == "DEADLINE" for result in late
    )
    # A caller that gives more gets more.
    results = stubs.attention.Decode(request, timeout=100).results
    assert not any(result.HasField("status") for result in results)


def test_shutdown_answers_what_was_taken(start, connect, rng):
    process = start("--threads-per-rank", 1, "--drain-timeout", "60s")
    stubs = connect(process.address)
    context_id = busy_context(stubs, rng)
    request = attention.DecodeRequest(items=[slow_item(context_id, rng) for _ in range(10)])
    taken = [stubs.attention.Decode.future(request, timeout=100) for _ in range(4)]
    eventually(lambda: inflight(process) == 4)
    assert process.terminate(timeout=60) == 0
    for call in taken:
        assert not any(result.HasField("status") for result in call.result(60).results)
    with pytest.raises(grpc.RpcError) as error:
        stubs.attention.Decode(request, timeout=5)
    assert error.value.code() == Code.UNAVAILABLE
    assert any("drained" in line for line in process.log)


def inflight(process):
    return value_of(scrape(process), "longspan_inflight_requests", op="Decode")


def test_while_it_drains_a_server_refuses_and_is_not_healthy(start, connect, rng):
    process = start("--threads-per-rank", 1, "--drain-timeout", "60s")
    stubs = connect(process.address)
    context_id = busy_context(stubs, rng)
    request = attention.DecodeRequest(items=[slow_item(context_id, rng) for _ in range(30)])
    health = health_pb2_grpc.HealthStub(stubs.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service="longspan.v1.AttentionService"))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    taken = stubs.attention.Decode.future(request, timeout=100)
    eventually(lambda: inflight(process) == 1)
    process.process.send_signal(signal.SIGTERM)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    try:
        stubs.create(context_id="late")
        raise AssertionError("a draining server took a context")
    except grpc.RpcError as error:
        assert error.code() == Code.UNAVAILABLE
        if "grpc-status-details-bin" in dict(error.trailing_metadata() or ()):
            assert details_of(error).reason == "DRAINING"
    assert not any(result.HasField("status") for result in taken.result(60).results)
    assert process.process.wait(60) == 0


def test_a_drain_that_takes_too_long_is_cut_short(start, connect, rng):
    process = start("--threads-per-rank", 1, "--drain-timeout", "50ms")
    stubs = connect(process.address)
    context_id = busy_context(stubs, rng)
    request = attention.DecodeRequest(items=[slow_item(context_id, rng) for _ in range(400)])
    taken = stubs.attention.Decode.future(request, timeout=100)
    eventually(lambda: inflight(process) == 1)
    assert process.terminate(timeout=20) == 0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(taken.exception).result(20) is not None or taken.done()


def test_a_second_signal_forces_the_end(connect, rng):
    process = Server("--threads-per-rank", 1, "--kv-capacity", "64MiB", "--drain-timeout", "100s")
    stubs = connect(process.address)
    context_id = busy_context(stubs, rng)
    request = attention.DecodeRequest(items=[slow_item(context_id, rng) for _ in range(400)])
    taken = stubs.attention.Decode.future(request, timeout=100)
    eventually(lambda: inflight(process) == 1)
    process.process.send_signal(signal.SIGTERM)
    eventually(lambda: any("draining" in line for line in process.log))
    process.process.send_signal(signal.SIGINT)
    assert process.process.wait(20) == 1
    assert taken.exception(20).code() == Code.UNAVAILABLE


def test_a_port_that_is_taken(server):
    port = server.address.rsplit(":", 1)[1]
    command = [binary(), "serve", "--port", port, "--metrics-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "cannot listen" in done.stderr
    metrics_port = server.metrics_address.rsplit(":", 1)[1]
    command = [binary(), "serve", "--port", "0", "--metrics-port", metrics_port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "metrics cannot be served" in done.stderr


def test_methods_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.txtpb").write_text('name: "broken"\nbranches {\n  nosuch: 1\n}\n')
    command = [binary(), "serve", "--port", "0", "--metrics-port", "0", "--methods-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.search(r"broken\.txtpb:3:\d+: .*nosuch", done.stderr)
