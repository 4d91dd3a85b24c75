"""Append, Prefill, Decode and DecodeStream: what becomes visible, in which order, and that it is
right."""

import queue
import threading

import grpc
import numpy
import pytest
from longspan.v1 import (
    attention_pb2 as attention,
    introspect_pb2 as introspect,
    method_pb2 as method_messages,
    tensor_pb2 as tensor,
)

from calls import (
    DIM,
    KV_HEADS,
    LAYERS,
    QUERY_HEADS,
    append_requests,
    array_of,
    assert_close,
    block_method,
    chunk,
    dense_attention,
    failed,
    fp32,
    item,
    query_of,
    refused,
    spec_of,
)

Code = grpc.StatusCode


def rows(rng, count):
    return rng.standard_normal((count, KV_HEADS, DIM), numpy.float32)


class Sender:
    """Messages of a stream, sent when the test says so."""

    def __init__(self):
        self._messages = queue.Queue()

    def send(self, message):
        self._messages.put(message)

    def close(self):
        self._messages.put(None)

    def __iter__(self):
        return iter(self._messages.get, None)


def test_append_is_seen_whole(stubs, rng):
    made = stubs.create()
    keys, values = rows(rng, 500), rows(rng, 500)
    bounds = [0, 1, 63, 64, 65, 300, 500]
    chunks = [
        chunk(layer, begin, keys[begin:end], values[begin:end])
        for layer in range(LAYERS)
        for begin, end in zip(bounds, bounds[1:])
    ]
    answer = stubs.append(made.context_id, chunks)
    assert answer.committed_length == 500 and list(answer.layer_lengths) == [500] * LAYERS
    query = query_of(rng)
    result = stubs.decode_one(item(made.context_id, query, layer=1))
    assert_close(array_of(result.output), dense_attention(query, keys, values, 499))


def test_an_append_that_fails_leaves_no_trace(stubs, rng):
    made = stubs.create()
    stubs.fill(rng, made.context_id, 100)
    before = stubs.get(made.context_id)
    good = chunk(0, 100, rows(rng, 50), rows(rng, 50))
    gap = chunk(1, 101, rows(rng, 1), rows(rng, 1))
    with refused(Code.OUT_OF_RANGE) as found:
        stubs.append(made.context_id, [good, gap])
    assert found[0].metadata["expected_pos"] == "100"
    after = stubs.get(made.context_id)
    assert (after.generation, list(after.layer_lengths)) == (before.generation, [100, 100])
    # Other bytes at the same place are welcome: the first ones never happened.
    stubs.append(made.context_id, [chunk(0, 100, rows(rng, 50), rows(rng, 50))])


def test_cancelled_appends_never_commit(stubs, rng):
    made = stubs.create()
    for _ in range(30):
        sender = Sender()
        ongoing = stubs.attention.Append.future(iter(sender))
        for request in append_requests(made.context_id, [chunk(0, 0, rows(rng, 64), rows(rng, 64))]):
            sender.send(request)
        threading.Event().wait(float(rng.random()) * 0.01)
        ongoing.cancel()
        sender.close()
    # The next one is let in once the last one is rolled back, and finds nothing of any.
    for _ in range(1000):
        try:
            answer = stubs.append(made.context_id, [])
            break
        except grpc.RpcError as error:
            assert error.code() == Code.ABORTED
            threading.Event().wait(0.01)
    assert list(answer.layer_lengths) == [0, 0] and answer.generation == made.generation


@pytest.mark.parametrize(
    "messages, field",
    [
        ([], "header"),
        ([attention.AppendRequest()], "header"),
        ([attention.AppendRequest(chunk=attention.AppendRequest.Chunk())], "header"),
    ],
)
def test_append_starts_with_its_header(stubs, messages, field):
    with refused(Code.INVALID_ARGUMENT) as found:
        stubs.attention.Append(iter(messages))
    assert found[0].fields == [field]


def test_append_has_one_header(stubs):
    made = stubs.create()
    header = attention.AppendRequest(header=attention.AppendRequest.Header(context_id=made.context_id))
    with refused(Code.INVALID_ARGUMENT) as found:
        stubs.attention.Append(iter([header, header]))
    assert found[0].fields == ["chunk"]


def prefill_header(context_id, **options):
    return attention.PrefillRequest(
        header=attention.PrefillRequest.Header(
            context_id=context_id, options=attention.AttentionOptions(**options)
        )
    )


def prefill_chunk(seq, layer, start_pos, query, key=None, value=None):
    message = attention.PrefillRequest.Chunk(
        seq=seq, layer=layer, start_pos=start_pos, query=fp32(query)
    )
    if key is not None:
        message.key.CopyFrom(fp32(key))
        message.value.CopyFrom(fp32(value))
    return attention.PrefillRequest(chunk=message)


def test_prefill_in_chunks_is_causal_attention(stubs, rng):
    made = stubs.create()
    query, keys, values = query_of(rng, 150), rows(rng, 150), rows(rng, 150)
    bounds = [0, 40, 64, 149, 150]
    requests = [prefill_header(made.context_id, return_lse=True)]
    for seq, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        requests.append(
            prefill_chunk(seq, 0, begin, query[begin:end], keys[begin:end], values[begin:end])
        )
    answers = list(stubs.attention.Prefill(iter(requests)))
    assert [answer.seq for answer in answers] == list(range(len(bounds) - 1))
    assert not any(answer.HasField("status") for answer in answers)
    output = numpy.concatenate([array_of(answer.output) for answer in answers])
    assert_close(output, dense_attention(query, keys, values, 0))
    lse = numpy.concatenate([array_of(answer.lse) for answer in answers])
    expected = [
        numpy.log(numpy.exp(keys[: row + 1, head // 2].astype(float) @ query[row, head] / 8).sum())
        for row in range(150)
        for head in range(QUERY_HEADS)
    ]
    assert numpy.abs(lse.reshape(-1) - expected).max() <= 1e-3
    assert [answer.layer_length for answer in answers] == bounds[1:]


def test_errors_of_chunks_are_in_band(stubs, rng):
    made = stubs.create()
    query, keys, values = query_of(rng, 8), rows(rng, 8), rows(rng, 8)
    requests = [
        prefill_header(made.context_id),
        prefill_chunk(1, 0, 0, query, keys, values),
        prefill_chunk(2, 0, 9, query, keys, values),
        prefill_chunk(3, 7, 8, query, keys, values),
        prefill_chunk(4, 0, 8, query, keys, values),
    ]
    answers = list(stubs.attention.Prefill(iter(requests)))
    assert [answer.seq for answer in answers] == [1, 2, 3, 4]
    assert failed(answers[1], Code.OUT_OF_RANGE).metadata["expected_pos"] == "8"
    assert failed(answers[2], Code.INVALID_ARGUMENT).fields == ["layer"]
    assert [answers[i].HasField("status") for i in (0, 3)] == [False, False]
    assert answers[3].layer_length == 16


def test_prefill_of_an_unknown_context_ends_the_stream(stubs):
    with refused(Code.NOT_FOUND):
        list(stubs.attention.Prefill(iter([prefill_header("nosuch")])))
    with refused(Code.INVALID_ARGUMENT) as found:
        list(stubs.attention.Prefill(iter([prefill_chunk(0, 0, 0, numpy.zeros((1, 1, 1)))])))
    assert found[0].fields == ["header"]


def test_decode_items_fail_each_on_its_own(stubs, rng):
    made = stubs.create()
    keys, values = stubs.fill(rng, made.context_id, 70)
    other = stubs.create()
    other_keys, other_values = stubs.fill(rng, other.context_id, 5)
    query = query_of(rng)
    results = stubs.attention.Decode(
        attention.DecodeRequest(
            items=[
                item(made.context_id, query),
                item("nosuch", query),
                item(other.context_id, query, layer=1),
                item(made.context_id, query, layer=9),
                item(made.context_id, query, layer=1),
            ]
        )
    ).results
    assert failed(results[1], Code.NOT_FOUND)
    assert failed(results[3], Code.INVALID_ARGUMENT).fields == ["layer"]
    assert_close(array_of(results[0].output), dense_attention(query, keys[0], values[0], 69))
    expected = dense_attention(query, other_keys[1], other_values[1], 4)
    assert_close(array_of(results[2].output), expected)
    assert_close(array_of(results[4].output), dense_attention(query, keys[1], values[1], 69))


def test_items_of_one_layer_run_in_order(stubs, rng):
    made = stubs.create()
    query, keys, values = query_of(rng, 6), rows(rng, 6), rows(rng, 6)
    items = [
        item(
            made.context_id,
            query[i : i + 1],
            start_pos=i,
            key=fp32(keys[i : i + 1]),
            value=fp32(values[i : i + 1]),
        )
        for i in range(6)
    ]
    results = stubs.attention.Decode(attention.DecodeRequest(items=items)).results
    assert [result.layer_length for result in results] == [1, 2, 3, 4, 5, 6]
    output = numpy.concatenate([array_of(result.output) for result in results])
    assert_close(output, dense_attention(query, keys, values, 0))
    # All of it again is a replay: the same answers, nothing written.
    again = stubs.attention.Decode(attention.DecodeRequest(items=items)).results
    assert [result.generation for result in again] == [results[-1].generation] * 6
    assert_close(numpy.concatenate([array_of(result.output) for result in again]), output)


def bf16(array):
    bits = numpy.ascontiguousarray(array, numpy.float32).view(numpy.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)
    return tensor.Tensor(dtype=tensor.DATA_TYPE_BF16, shape=array.shape, raw=rounded.tobytes())


def test_outputs_have_the_type_of_the_query(stubs, rng):
    made = stubs.create()
    keys, values = stubs.fill(rng, made.context_id, 30)
    query = query_of(rng)
    half = tensor.Tensor(
        dtype=tensor.DATA_TYPE_FP16, shape=query.shape, raw=query.astype(numpy.float16).tobytes()
    )
    expected = dense_attention(query, keys[0], values[0], 29)
    for sent in (half, bf16(query)):
        result = stubs.decode_one(attention.DecodeItem(context_id=made.context_id, query=sent))
        assert result.output.dtype == sent.dtype
        bits = numpy.frombuffer(result.output.raw, numpy.uint16)
        if sent is half:
            output = bits.view(numpy.float16).astype(numpy.float32)
        else:
            output = (bits.astype(numpy.uint32) << 16).view(numpy.float32)
        assert_close(output.reshape(query.shape), expected, 2e-2)


def open_stream(*context_ids, window=0):
    return attention.DecodeStreamRequest(
        open=attention.DecodeStreamRequest.Open(context_ids=context_ids, window=window)
    )


def step(seq, *items):
    return attention.DecodeStreamRequest(
        step=attention.DecodeStreamRequest.Step(seq=seq, items=items)
    )


def test_decode_stream_answers_in_order(stubs, rng):
    made = [stubs.create() for _ in range(3)]
    filled = [stubs.fill(rng, one.context_id, 40 + i) for i, one in enumerate(made)]
    query = query_of(rng)
    requests = [open_stream(*(one.context_id for one in made))]
    for seq in range(50):
        requests.append(step(seq, *(item(one.context_id, query, layer=seq % 2) for one in made)))
    answers = list(stubs.attention.DecodeStream(iter(requests)))
    assert answers[0].opened.window > 0
    assert [answer.result.seq for answer in answers[1:]] == list(range(50))
    for answer in answers[1:]:
        for i, result in enumerate(answer.result.results):
            keys, values = (part[answer.result.seq % 2] for part in filled[i])
            assert_close(array_of(result.output), dense_attention(query, keys, values, 39 + i))


def test_decode_stream_protocol(stubs, rng):
    made = stubs.create()
    stubs.fill(rng, made.context_id, 4)
    one = item(made.context_id, query_of(rng))
    opened = open_stream(made.context_id)
    for requests, field in (
        ([step(1, one)], "open"),
        ([open_stream()], "open.context_ids"),
        ([opened, opened], "step"),
        ([opened, step(2, one), step(2, one)], "step.seq"),
    ):
        with refused(Code.INVALID_ARGUMENT) as found:
            list(stubs.attention.DecodeStream(iter(requests)))
        assert found[0].fields == [field]
    with refused(Code.NOT_FOUND):
        list(stubs.attention.DecodeStream(iter([open_stream("nosuch")])))


def test_steps_fail_in_band(stubs, rng):
    made, other = stubs.create(), stubs.create()
    stubs.fill(rng, made.context_id, 4)
    stubs.fill(rng, other.context_id, 4)
    query = query_of(rng)
    requests = [
        open_stream(made.context_id),
        step(1, item(other.context_id, query)),
        step(2),
        step(3, item(made.context_id, query)),
    ]
    answers = [answer.result for answer in stubs.attention.DecodeStream(iter(requests))][1:]
    assert failed(answers[0].results[0], Code.INVALID_ARGUMENT).fields == ["context_id"]
    assert failed(answers[1], Code.INVALID_ARGUMENT).fields == ["items"]
    assert not answers[2].results[0].HasField("status")


def test_selections_and_their_explanation(stubs, rng):
    made = stubs.create(spec_of(methods=[block_method()]))
    stubs.fill(rng, made.context_id, 700)
    query = query_of(rng)
    options = attention.AttentionOptions(return_selection=True)
    result = stubs.decode_one(item(made.context_id, query, options=options))
    answer = stubs.introspect.Explain(
        introspect.ExplainRequest(
            context_id=made.context_id, query=fp32(query), compare_with_dense=True
        )
    )
    assert answer.method_name == "blocks"
    assert 0 < answer.read_fraction < 0.5
    assert len(answer.recall) == len(answer.relative_error) == QUERY_HEADS

    def spans(selections):
        return [
            (row.position, row.query_head, [(span.begin, span.end) for span in row.spans])
            for row in selections
        ]

    assert spans(result.selections) == spans(answer.selections)
    for row, recall in zip(answer.selections, answer.recall):
        assert row.position == 699
        assert sum(span.end - span.begin for span in row.spans) == row.num_tokens
        assert sum(span.mass for span in row.spans) == pytest.approx(recall, abs=1e-3)
    everything = stubs.introspect.Explain(
        introspect.ExplainRequest(
            context_id=made.context_id,
            query=fp32(query),
            method=method_messages.Method(
                name="all", branches=[{"selection": {"kind": "KIND_ALL"}}]
            ),
            compare_with_dense=True,
        )
    )
    assert everything.read_fraction == 1.0
    assert list(everything.recall) == pytest.approx([1.0] * QUERY_HEADS, abs=1e-3)
