"""The life of contexts: idempotent creation, pages, forks, truncation, leases."""

import threading

import grpc
import numpy
import pytest
from google.protobuf import duration_pb2
from longspan.v1 import (
    context_pb2 as context,
    server_pb2 as server_messages,
    tensor_pb2 as tensor,
)

from calls import (
    LAYERS,
    array_of,
    assert_close,
    block_method,
    dense_attention,
    item,
    query_of,
    refused,
    spec_of,
)

Code = grpc.StatusCode


def fork(stubs, context_id, num_tokens, **fields):
    request = context.ForkContextRequest(context_id=context_id, num_tokens=num_tokens, **fields)
    return stubs.contexts.ForkContext(request).context


def truncate(stubs, context_id, num_tokens):
    request = context.TruncateContextRequest(context_id=context_id, num_tokens=num_tokens)
    return stubs.contexts.TruncateContext(request).context


def delete(stubs, context_id):
    stubs.contexts.DeleteContext(context.DeleteContextRequest(context_id=context_id))


def test_creation_is_idempotent(stubs):
    asked = spec_of(labels={"team": "a"})
    made = stubs.create(asked, context_id="again")
    assert stubs.create(asked, context_id="again").create_time == made.create_time
    # What the server answers may be asked for, too.
    assert stubs.create(made.spec, context_id="again").create_time == made.create_time
    delete(stubs, "again")
    fresh = stubs.create(asked, context_id="again")
    assert fresh.committed_length == 0 and fresh.create_time.ToNanoseconds() > 0
    delete(stubs, "again")


def test_a_request_id_makes_one_context(stubs):
    first = stubs.create(request_id="retry-me")
    assert stubs.create(request_id="retry-me").context_id == first.context_id
    assert stubs.create().context_id != first.context_id
    with refused(Code.ALREADY_EXISTS):
        stubs.create(spec_of(num_layers=3), request_id="retry-me")
    delete(stubs, first.context_id)
    assert stubs.create(request_id="retry-me").context_id != first.context_id


def test_the_effective_spec_is_answered(stubs):
    spec = stubs.create(context.ContextSpec(
        num_layers=1, num_query_heads=2, num_kv_heads=1, key_head_dim=64
    )).spec
    assert spec.value_head_dim == 64 and spec.kv_dtype == tensor.DATA_TYPE_BF16
    assert spec.scale == pytest.approx(0.125)
    assert [one.name for one in spec.methods] == ["dense"] and spec.default_method == "dense"
    assert spec.layout.stripe_tokens % 64 == 0 and spec.max_tokens > 0


def test_concurrent_creations_make_one_context(server, connect):
    connections = [connect(server.address) for _ in range(8)]
    for one in connections:
        grpc.channel_ready_future(one.channel).result(30)
    barrier = threading.Barrier(len(connections))
    outcomes = []

    def create(own):
        barrier.wait()
        try:
            outcomes.append(own.create(context_id="race").create_time.ToNanoseconds())
        except grpc.RpcError as error:
            assert error.code() == Code.UNAVAILABLE  # being created: the client comes again
            outcomes.append(None)

    threads = [threading.Thread(target=create, args=(own,)) for own in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == len(connections)
    assert len({outcome for outcome in outcomes if outcome}) == 1
    delete(connections[0], "race")


def test_listing_pages_through_everything_once(start, connect):
    stubs = connect(start().address)
    names = {f"ctx-{i:03}" for i in range(25)}
    for name in names:
        stubs.create(context_id=name)
    seen, token = [], ""
    while True:
        page = stubs.contexts.ListContexts(
            context.ListContextsRequest(page_size=7, page_token=token)
        )
        assert len(page.contexts) <= 7
        seen += [one.context_id for one in page.contexts]
        token = page.next_page_token
        if not token:
            break
    assert seen == sorted(names)
    assert len(stubs.contexts.ListContexts(context.ListContextsRequest()).contexts) == 25
    with refused(Code.INVALID_ARGUMENT) as found:
        stubs.contexts.ListContexts(context.ListContextsRequest(page_token="!"))
    assert found[0].fields == ["page_token"]


def test_a_fork_shares_and_then_goes_its_own_way(stubs, rng):
    parent = stubs.create()
    keys, values = stubs.fill(rng, parent.context_id, 200)
    child = fork(stubs, parent.context_id, 130, request_id="fork-once")
    assert child.committed_length == 130 and list(child.layer_lengths) == [130] * LAYERS
    assert fork(stubs, parent.context_id, 130, request_id="fork-once").context_id == child.context_id
    more_keys, more_values = stubs.fill(rng, child.context_id, 20, start_pos=130)
    query = query_of(rng)
    for context_id, shared, extra_keys, extra_values in (
        (parent.context_id, 200, keys[1][:0], values[1][:0]),
        (child.context_id, 130, more_keys[1], more_values[1]),
    ):
        result = stubs.decode_one(item(context_id, query, layer=1))
        all_keys = list(keys[1][:shared]) + list(extra_keys)
        all_values = list(values[1][:shared]) + list(extra_values)
        expected = dense_attention(
            query, numpy.stack(all_keys), numpy.stack(all_values), len(all_keys) - 1
        )
        assert_close(array_of(result.output), expected)
    delete(stubs, parent.context_id)
    assert stubs.get(child.context_id).committed_length == 150


def test_truncation(stubs, rng):
    made = stubs.create()
    keys, values = stubs.fill(rng, made.context_id, 100)
    before = stubs.get(made.context_id).generation
    cut = truncate(stubs, made.context_id, 40)
    assert cut.committed_length == 40 and cut.generation > before
    assert truncate(stubs, made.context_id, 40).generation == cut.generation
    query = query_of(rng)
    result = stubs.decode_one(item(made.context_id, query))
    assert_close(array_of(result.output), dense_attention(query, keys[0], values[0], 39))


def test_bytes_and_their_prediction(stubs, rng):
    spec = spec_of(methods=[block_method()])
    predicted = stubs.server.CheckSpec(server_messages.CheckSpecRequest(spec=spec))
    assert not predicted.reasons
    made = stubs.create(spec)
    stubs.fill(rng, made.context_id, 8192)  # whole pages of summaries on each rank
    stored = stubs.get(made.context_id)
    assert stored.kv_bytes == pytest.approx(predicted.kv_bytes_per_token * 8192, rel=0.1)
    assert stored.summary_bytes == pytest.approx(predicted.summary_bytes_per_token * 8192, rel=0.1)


def with_ttl(seconds):
    return spec_of(ttl=duration_pb2.Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9)))


def keep_alive(stubs, *context_ids):
    requests = [context.KeepAliveRequest(context_ids=context_ids)]
    return next(iter(stubs.contexts.KeepAlive(iter(requests)))).leases


def test_leases_are_renewed_by_keep_alive(stubs):
    made = stubs.create(with_ttl(1000))
    assert made.expire_time.ToNanoseconds() > made.create_time.ToNanoseconds()
    forever = stubs.create()
    assert not forever.HasField("expire_time")
    lease, unbounded, unknown = keep_alive(stubs, made.context_id, forever.context_id, "nosuch")
    assert lease.remaining.seconds == 1000 and not lease.HasField("status")
    assert not unbounded.HasField("remaining")
    assert unknown.status.code == Code.NOT_FOUND.value[0]


def test_an_unused_context_expires_and_its_memory_comes_back(start, connect, rng):
    stubs = connect(start("--lease-check-interval", "20ms").address)
    lasting = stubs.create(context_id="lasting")
    leased = stubs.create(with_ttl(0.3), context_id="leased")
    stubs.fill(rng, leased.context_id, 64)
    listing = context.ListContextsRequest()
    for _ in range(1000):
        names = [one.context_id for one in stubs.contexts.ListContexts(listing).contexts]
        if names == [lasting.context_id]:
            break
        threading.Event().wait(0.02)
    assert names == [lasting.context_id]
    with refused(Code.NOT_FOUND):
        stubs.get("leased")


def test_use_renews_a_lease(start, connect, rng):
    stubs = connect(start("--lease-check-interval", "20ms").address)
    used = stubs.create(with_ttl(1.5))
    idle = stubs.create(with_ttl(1.5))
    stubs.fill(rng, used.context_id, 8)
    # Until the idle one is gone, the used one is used.
    for _ in range(2000):
        assert not stubs.decode_one(item(used.context_id, query_of(rng))).HasField("status")
        ids = [one.context_id for one in stubs.contexts.ListContexts(context.ListContextsRequest()).contexts]
        if idle.context_id not in ids:
            break
        threading.Event().wait(0.005)
    assert ids == [used.context_id]
