"""The error contract: canonical codes, stable reasons, and details that name what is wrong."""

import concurrent.futures
import threading

import grpc
import numpy
import pytest
from google.protobuf import duration_pb2
from longspan.v1 import (
    attention_pb2 as attention,
    context_pb2 as context,
    introspect_pb2 as introspect,
    method_pb2 as method,
    server_pb2 as server_messages,
    tensor_pb2 as tensor,
)

from calls import (
    DIM,
    KV_HEADS,
    QUERY_HEADS,
    append_requests,
    block_method,
    chunk,
    failed,
    fp32,
    item,
    query_of,
    refused,
    spec_of,
)

Code = grpc.StatusCode


def rows(rng, count, heads=KV_HEADS):
    return rng.standard_normal((count, heads, DIM), numpy.float32)


@pytest.mark.parametrize(
    "changes, fields",
    [
        ({"num_layers": 0}, ["spec.num_layers"]),
        ({"num_layers": 1 << 31}, ["spec.num_layers"]),
        ({"num_kv_heads": 3}, ["spec.num_kv_heads"]),
        ({"key_head_dim": 0, "num_layers": 0}, ["spec.num_layers", "spec.key_head_dim"]),
        ({"scale": float("nan")}, ["spec.scale"]),
        ({"scale": -1}, ["spec.scale"]),
        ({"logit_soft_cap": float("inf")}, ["spec.logit_soft_cap"]),
        ({"sink_logits": [1.0]}, ["spec.sink_logits"]),
        ({"sink_logits": [float("nan")] * QUERY_HEADS}, ["spec.sink_logits"]),
        ({"kv_dtype": 77}, ["spec.kv_dtype"]),
        ({"max_tokens": 1 << 62}, ["spec.max_tokens"]),
        ({"layout": context.Layout(stripe_tokens=65)}, ["spec.layout.stripe_tokens"]),
        ({"ttl": duration_pb2.Duration(seconds=-1)}, ["spec.ttl"]),
        ({"labels": {"": "x"}}, ["spec.labels"]),
        ({"default_method": "nosuch"}, ["spec.default_method"]),
        ({"methods": [block_method(), block_method()]}, ["spec.methods[1].name"]),
        (
            {"methods": [block_method(block_tokens=63)]},
            [
                "spec.methods[0].branches[0].summary.block_tokens",
                "spec.methods[0].branches[0].selection.block_tokens",
            ],
        ),
    ],
)
def test_a_bad_spec_names_every_field(stubs, changes, fields):
    with refused(Code.INVALID_ARGUMENT) as found:
        stubs.create(spec_of(**changes))
    assert set(fields) <= set(found[0].fields)
    assert found[0].reason == "INVALID_FIELD"


@pytest.mark.parametrize("context_id", ["has space", "x" * 129, "sl/ash", "ünï"])
def test_bad_ids(stubs, context_id):
    with refused(Code.INVALID_ARGUMENT) as found:
        stubs.create(context_id=context_id)
    assert found[0].fields == ["context_id"]


def test_what_is_not_served_is_listed_with_every_reason_at_once(stubs):
    unserved = method.Method(
        name="future",
        branches=[
            method.Branch(
                summary=method.Summary(kind=method.Summary.KIND_LOW_BIT, bits=4, levels=2),
                search=method.Search(view=method.Search.VIEW_TOKEN),
                selection=method.Selection(kind=method.Selection.KIND_TOP_P, threshold=0.9),
                mask=method.StaticMask(radial=method.StaticMask.Radial(frame_tokens=4)),
                budget=method.Budget(both=method.Budget.Amount(mass=0.9)),
            )
        ],
        roles=method.Roles(heads=[method.Roles.HeadRole(layer=1)]),
    )
    spec = spec_of(methods=[unserved], durability=context.ContextSpec.DURABILITY_REPLICATED)
    branch = "methods[0].branches[0]"
    expected = {
        f"{branch}.summary.kind",
        f"{branch}.summary.bits",
        f"{branch}.summary.levels",
        f"{branch}.search.view",
        f"{branch}.selection.kind",
        f"{branch}.selection.threshold",
        f"{branch}.mask.radial",
        f"{branch}.budget.both.mass",
        "methods[0].roles.heads",
        "durability",
    }
    with refused(Code.UNIMPLEMENTED) as found:
        stubs.create(spec)
    assert set(found[0].fields) == {f"spec.{field}" for field in expected}
    assert found[0].reason == "UNSUPPORTED"
    answer = stubs.server.CheckSpec(server_messages.CheckSpecRequest(spec=spec))
    assert {reason.field for reason in answer.reasons} == expected
    assert {reason.code for reason in answer.reasons} == {"UNIMPLEMENTED"}


def test_many_reasons_fit_the_headers(stubs):
    broken = [block_method(name=f"broken-{i}", block_tokens=63) for i in range(64)]
    with refused(Code.INVALID_ARGUMENT) as found:
        stubs.create(spec_of(methods=broken))
    assert "more" in found[0].message and found[0].fields


def test_unknown_contexts(stubs, rng):
    for call in (
        lambda: stubs.get("nosuch"),
        lambda: stubs.contexts.DeleteContext(context.DeleteContextRequest(context_id="nosuch")),
        lambda: stubs.contexts.ForkContext(context.ForkContextRequest(context_id="nosuch")),
        lambda: stubs.contexts.TruncateContext(
            context.TruncateContextRequest(context_id="nosuch")
        ),
        lambda: stubs.append("nosuch", []),
        lambda: stubs.introspect.Explain(introspect.ExplainRequest(context_id="nosuch")),
    ):
        with refused(Code.NOT_FOUND) as found:
            call()
        assert found[0].reason == "CONTEXT_NOT_FOUND"
        assert found[0].metadata["context_id"] == "nosuch"
    assert failed(stubs.decode_one(item("nosuch", query_of(rng))), Code.NOT_FOUND)
    missing_ok = context.DeleteContextRequest(context_id="nosuch", allow_missing=True)
    stubs.contexts.DeleteContext(missing_ok)


def test_an_id_that_another_spec_has_taken(stubs):
    made = stubs.create()
    assert stubs.create(context_id=made.context_id).generation == made.generation
    with refused(Code.ALREADY_EXISTS) as found:
        stubs.create(spec_of(num_layers=3), context_id=made.context_id)
    assert found[0].reason == "CONTEXT_EXISTS"


def tensor_faults():
    good = (1, QUERY_HEADS, DIM)
    zeros = bytes(4 * QUERY_HEADS * DIM)
    fp32_type = tensor.DATA_TYPE_FP32
    huge = [1 << 40, QUERY_HEADS, DIM]
    return [
        (tensor.Tensor(dtype=fp32_type, shape=good, raw=zeros[:-1]), Code.INVALID_ARGUMENT, "query.raw"),
        (tensor.Tensor(dtype=fp32_type, shape=good), Code.INVALID_ARGUMENT, "query.raw"),
        (tensor.Tensor(dtype=fp32_type, shape=(1, 3, DIM), raw=zeros), Code.INVALID_ARGUMENT, "query.shape"),
        (tensor.Tensor(dtype=fp32_type, shape=(QUERY_HEADS, DIM), raw=zeros), Code.INVALID_ARGUMENT, "query.shape"),
        (tensor.Tensor(dtype=fp32_type, shape=(0, QUERY_HEADS, DIM)), Code.INVALID_ARGUMENT, "query.shape"),
        (tensor.Tensor(dtype=fp32_type, shape=(-1, QUERY_HEADS, DIM)), Code.INVALID_ARGUMENT, "query.shape"),
        (tensor.Tensor(dtype=fp32_type, shape=huge, raw=zeros), Code.INVALID_ARGUMENT, "query.shape"),
        (tensor.Tensor(shape=good, raw=zeros), Code.INVALID_ARGUMENT, "query.dtype"),
        (tensor.Tensor(dtype=99, shape=good, raw=zeros), Code.INVALID_ARGUMENT, "query.dtype"),
        (
            tensor.Tensor(dtype=tensor.DATA_TYPE_FP8_E4M3, shape=good, raw=zeros),
            Code.UNIMPLEMENTED,
            "query.dtype",
        ),
        (
            tensor.Tensor(dtype=fp32_type, shape=good, region=tensor.RegionRef(name="shm")),
            Code.UNIMPLEMENTED,
            "query.region",
        ),
    ]


@pytest.mark.parametrize("fault, code, field", tensor_faults())
def test_bad_tensors(stubs, rng, fault, code, field):
    made = stubs.create()
    stubs.fill(rng, made.context_id, 4)
    result = stubs.decode_one(attention.DecodeItem(context_id=made.context_id, query=fault))
    assert failed(result, code).fields == [field]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_name_field_and_index(stubs, rng, bad):
    made = stubs.create()
    stubs.fill(rng, made.context_id, 4)
    query = query_of(rng)
    query.reshape(-1)[37] = bad
    details = failed(stubs.decode_one(item(made.context_id, query)), Code.INVALID_ARGUMENT)
    assert details.fields == ["query.raw"] and "37" in details.message

    value = rows(rng, 8)
    value.reshape(-1)[1001] = bad
    with refused(Code.INVALID_ARGUMENT) as found:
        stubs.append(made.context_id, [chunk(0, 4, rows(rng, 8), value)])
    assert found[0].fields == ["value.raw"] and "1001" in found[0].message
    assert list(stubs.get(made.context_id).layer_lengths) == [4, 4]


@pytest.mark.parametrize(
    "kv_dtype, largest, refused_value",
    [
        (tensor.DATA_TYPE_FP16, 65519.0, 65520.0),
        (tensor.DATA_TYPE_BF16, 3.39e38, 3.4e38),
        (tensor.DATA_TYPE_FP32, 3.4e38, float("inf")),
    ],
)
def test_values_must_be_finite_in_the_type_of_the_cache(
    stubs, rng, kv_dtype, largest, refused_value
):
    made = stubs.create(spec_of(kv_dtype=kv_dtype))
    key = rows(rng, 2)
    key[1, 0, 5] = largest
    stubs.append(made.context_id, [chunk(0, 0, key, rows(rng, 2))])
    key[1, 0, 5] = refused_value
    with refused(Code.INVALID_ARGUMENT) as found:
        stubs.append(made.context_id, [chunk(1, 0, key, rows(rng, 2))])
    assert found[0].fields == ["key.raw"]


def test_fields_that_belong_together(stubs, rng):
    made = stubs.create()
    stubs.fill(rng, made.context_id, 4)

    def fields_of(**fields):
        result = stubs.decode_one(item(made.context_id, query_of(rng), **fields))
        return failed(result, Code.INVALID_ARGUMENT).fields

    assert fields_of(start_pos=4, key=fp32(rows(rng, 1))) == ["value"]
    assert fields_of(start_pos=4, value=fp32(rows(rng, 1))) == ["key"]
    assert fields_of(key=fp32(rows(rng, 1)), value=fp32(rows(rng, 1))) == ["start_pos"]
    assert fields_of(start_pos=4, key=fp32(rows(rng, 2)), value=fp32(rows(rng, 1))) == ["key.shape"]
    assert fields_of(layer=2) == ["layer"]
    assert fields_of(gates=fp32(rng.random((1, QUERY_HEADS, 1)))) == ["gates"]
    assert fields_of(search_query=fp32(query_of(rng))) == ["search_query"]
    assert fields_of(start_pos=1 << 60) == ["start_pos"]


def test_gates_and_search_queries_are_asked_for_by_name(stubs, rng):
    shipped = {one.name: one for one in capabilities(stubs).methods}
    made = stubs.create(spec_of(methods=[shipped["nsa_pooled"], shipped["superlinear"]]))
    stubs.fill(rng, made.context_id, 300)
    for name, field in (("nsa_pooled", "gates"), ("superlinear", "search_query")):
        options = attention.AttentionOptions(method_name=name)
        result = stubs.decode_one(item(made.context_id, query_of(rng), options=options))
        assert failed(result, Code.INVALID_ARGUMENT).fields == [field]


def capabilities(stubs):
    return stubs.server.GetCapabilities(server_messages.GetCapabilitiesRequest())


def test_methods_of_a_call(stubs, rng):
    made = stubs.create(spec_of(methods=[block_method()]))
    stubs.fill(rng, made.context_id, 300)

    def decode(**options):
        options = attention.AttentionOptions(**options)
        return stubs.decode_one(item(made.context_id, query_of(rng), options=options))

    details = failed(decode(method_name="nosuch"), Code.NOT_FOUND)
    assert details.reason == "METHOD_NOT_FOUND"
    # Its summaries are not kept: the caller has to make another context and refill it.
    other = block_method(name="inline", block_tokens=128)
    assert failed(decode(method=other), Code.FAILED_PRECONDITION)
    assert not decode(method=block_method(name="inline")).HasField("status")
    unserved = method.Method(
        name="x", branches=[method.Branch(mask=method.StaticMask(causality=2, window_tokens=4))]
    )
    details = failed(decode(method=unserved), Code.UNIMPLEMENTED)
    assert details.fields == ["options.method.branches[0].mask.causality"]
    both = failed(
        decode(method=block_method(), method_name="blocks"), Code.INVALID_ARGUMENT
    )
    assert both.fields == ["options.method"]


def test_stale_generations(stubs, rng):
    made = stubs.create()
    stubs.fill(rng, made.context_id, 4)
    now = stubs.get(made.context_id).generation
    assert now > made.generation
    query = query_of(rng)
    details = failed(
        stubs.decode_one(item(made.context_id, query, expected_generation=now - 1)), Code.ABORTED
    )
    assert details.reason == "STALE_GENERATION"
    assert details.metadata["generation"] == str(now)
    fresh = stubs.decode_one(item(made.context_id, query, expected_generation=now))
    assert not fresh.HasField("status") and fresh.generation == now
    for call in (
        lambda: stubs.append(made.context_id, [], expected_generation=now + 7),
        lambda: stubs.contexts.TruncateContext(
            context.TruncateContextRequest(context_id=made.context_id, expected_generation=now + 7)
        ),
        lambda: stubs.contexts.ForkContext(
            context.ForkContextRequest(context_id=made.context_id, expected_generation=now + 7)
        ),
        lambda: stubs.contexts.DeleteContext(
            context.DeleteContextRequest(context_id=made.context_id, expected_generation=now + 7)
        ),
    ):
        with refused(Code.ABORTED) as found:
            call()
        assert found[0].reason == "STALE_GENERATION"
    assert stubs.get(made.context_id).generation == now


def test_positional_writes(stubs, rng):
    made = stubs.create()
    keys, values = stubs.fill(rng, made.context_id, 10)
    generation = stubs.get(made.context_id).generation
    # Equal bytes below the end: nothing happens.
    stubs.append(made.context_id, [chunk(0, 3, keys[0, 3:7], values[0, 3:7])])
    assert stubs.get(made.context_id).generation == generation
    with refused(Code.ABORTED) as found:
        stubs.append(made.context_id, [chunk(0, 3, keys[0, 3:7], -values[0, 3:7])])
    with refused(Code.OUT_OF_RANGE) as found:
        stubs.append(made.context_id, [chunk(0, 12, keys[0, :1], values[0, :1])])
    assert found[0].metadata["expected_pos"] == "10"
    ahead = item(
        made.context_id,
        query_of(rng),
        start_pos=11,
        key=fp32(keys[0, :1]),
        value=fp32(values[0, :1]),
    )
    details = failed(stubs.decode_one(ahead), Code.OUT_OF_RANGE)
    assert details.reason == "POSITION" and details.metadata["expected_pos"] == "10"
    unseen = failed(stubs.decode_one(item(made.context_id, query_of(rng), start_pos=10)), Code.OUT_OF_RANGE)
    assert unseen.metadata["expected_pos"] == "10"
    assert list(stubs.get(made.context_id).layer_lengths) == [10, 10]
    for tokens in (11, 1 << 63):
        with refused(Code.OUT_OF_RANGE):
            stubs.contexts.TruncateContext(
                context.TruncateContextRequest(context_id=made.context_id, num_tokens=tokens)
            )
        with refused(Code.OUT_OF_RANGE):
            stubs.contexts.ForkContext(
                context.ForkContextRequest(context_id=made.context_id, num_tokens=tokens)
            )


def test_a_context_beyond_its_own_bound_is_a_quota(stubs, rng):
    made = stubs.create(spec_of(max_tokens=16))
    stubs.fill(rng, made.context_id, 16)
    step = item(
        made.context_id,
        query_of(rng),
        start_pos=16,
        key=fp32(rows(rng, 1)),
        value=fp32(rows(rng, 1)),
    )
    details = failed(stubs.decode_one(step), Code.RESOURCE_EXHAUSTED)
    assert details.reason == "QUOTA" and details.quota == [f"contexts/{made.context_id}"]
    assert details.retry_seconds is None
    with refused(Code.RESOURCE_EXHAUSTED) as found:
        stubs.append(made.context_id, [chunk(0, 16, rows(rng, 1), rows(rng, 1))])
    assert found[0].reason == "QUOTA"


def test_a_full_cluster(start, connect, rng):
    small = connect(start("--max-contexts", 2, "--kv-capacity", "1MiB").address)
    first = small.create(context_id="first")
    small.create(context_id="second")
    with refused(Code.RESOURCE_EXHAUSTED) as found:
        small.create(context_id="third")
    assert found[0].reason == "CAPACITY" and found[0].retry_seconds > 0
    with refused(Code.RESOURCE_EXHAUSTED) as found:
        small.fill(rng, first.context_id, 4096)
    assert found[0].reason == "CAPACITY" and found[0].retry_seconds > 0
    # Nothing was taken, and what fits still fits.
    assert list(small.get("first").layer_lengths) == [0, 0]
    small.fill(rng, "first", 64)


def test_a_full_queue_is_refused_and_recovers(start, connect, rng):
    process = start("--max-queue-depth", 8, "--threads-per-rank", 1)
    stubs = connect(process.address)
    made = stubs.create()
    stubs.fill(rng, made.context_id, 32768)
    query = query_of(rng, 64)
    request = attention.DecodeRequest(items=[item(made.context_id, query) for _ in range(4)])
    barrier = threading.Barrier(8)

    def decode(_):
        own = connect(process.address)
        barrier.wait()
        codes = []
        for _ in range(6):
            try:
                own.attention.Decode(request, timeout=60)
                codes.append(None)
            except grpc.RpcError as error:
                trailing = dict(error.trailing_metadata())
                assert int(trailing["grpc-retry-pushback-ms"]) > 0
                codes.append(error.code())
        return codes

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        codes = [code for some in pool.map(decode, range(8)) for code in some]
    assert set(codes) == {None, Code.RESOURCE_EXHAUSTED}
    assert not stubs.decode_one(item(made.context_id, query)).HasField("status")


def test_limits_are_enforced_as_advertised(stubs, rng):
    limits = capabilities(stubs).limits
    made = stubs.create()
    stubs.fill(rng, made.context_id, 100)
    one = item(made.context_id, query_of(rng))
    with refused(Code.INVALID_ARGUMENT) as found:
        stubs.attention.Decode(attention.DecodeRequest(items=[one] * (limits.max_batch_items + 1)))
    assert found[0].fields == ["items"]
    with refused(Code.INVALID_ARGUMENT) as found:
        stubs.attention.Decode(attention.DecodeRequest())
    assert found[0].fields == ["items"]
    many_rows = item(made.context_id, query_of(rng, limits.max_decode_rows + 1))
    assert failed(stubs.decode_one(many_rows), Code.INVALID_ARGUMENT).fields == ["query.shape"]
    too_many = limits.max_chunk_bytes // (8 * KV_HEADS * DIM) + 1
    with refused(Code.INVALID_ARGUMENT) as found:
        stubs.append(made.context_id, [chunk(0, 100, rows(rng, too_many), rows(rng, too_many))])
    assert found[0].fields == ["key.raw"]
    too_large = attention.DecodeRequest(
        items=[attention.DecodeItem(query=tensor.Tensor(raw=bytes(limits.max_message_bytes)))]
    )
    with pytest.raises(grpc.RpcError) as error:
        stubs.attention.Decode(too_large)
    assert error.value.code() == Code.RESOURCE_EXHAUSTED


def test_one_append_of_a_context_at_a_time(stubs, rng):
    made = stubs.create()
    stubs.fill(rng, made.context_id, 4)
    release = threading.Event()

    def slowly():
        requests = append_requests(made.context_id, [chunk(0, 4, rows(rng, 2), rows(rng, 2))])
        yield from requests
        release.wait(30)

    ongoing = stubs.attention.Append.future(slowly())

    def is_ahead():
        nonlocal ongoing
        if ongoing.done():  # a probe was there first
            ongoing = stubs.attention.Append.future(slowly())
        return append_is_refused(stubs, made.context_id)

    try:
        wait_until(is_ahead)
        # Reading goes on, and sees nothing of it.
        assert not stubs.decode_one(item(made.context_id, query_of(rng))).HasField("status")
        assert list(stubs.get(made.context_id).layer_lengths) == [4, 4]
        write = item(
            made.context_id,
            query_of(rng),
            start_pos=4,
            key=fp32(rows(rng, 1)),
            value=fp32(rows(rng, 1)),
        )
        assert failed(stubs.decode_one(write), Code.ABORTED).reason == "APPEND_IN_PROGRESS"
    finally:
        release.set()
    assert list(ongoing.result(timeout=30).layer_lengths) == [6, 4]


def append_is_refused(stubs, context_id):
    try:
        stubs.append(context_id, [])
        return False
    except grpc.RpcError as error:
        return error.code() == Code.ABORTED


def wait_until(condition, attempts=1000):
    for _ in range(attempts):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError("it never came true")
