"""The Python package against a real server: life cycle, data plane, streams, errors."""

import grpc
import longspan
import numpy
import pytest
from attention import attend, error, rows
from longspan import context as context_module
from longspan import streams as streams_module

HEADS, KV_HEADS, DIM = 4, 2, 64
SHAPE = {"num_layers": 2, "num_query_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM}
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}


def make_context(client, **changes):
    return client.create_context(**{**SHAPE, "kv_dtype": "fp32", **changes})


def filled(client, rng, tokens=200, **changes):
    """A context with `tokens` random tokens in both layers; its keys and values of layer 0."""
    context = make_context(client, **changes)
    key, value = rows(rng, tokens, KV_HEADS, DIM), rows(rng, tokens, KV_HEADS, DIM)
    for layer in range(2):
        context.append(layer, key, value, start_pos=0)
    return context, key, value


def refusal(call):
    with pytest.raises(longspan.Error) as caught:
        call()
    return caught.value


# ---- Attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_prefill_then_decode_equals_naive_attention(client, rng, dtype):
    context = make_context(client, kv_dtype="fp32" if dtype == "float32" else "fp16")
    key, value = rows(rng, 131, KV_HEADS, DIM, dtype), rows(rng, 131, KV_HEADS, DIM, dtype)
    query = rows(rng, 131, HEADS, DIM, dtype)
    expected, expected_lse = attend(query, key, value, 0)
    tolerance = TOLERANCE["fp32" if dtype == "float32" else "fp16"]

    filled_in = context.prefill(0, query[:130], key[:130], value[:130], 0, return_lse=True)
    step = context.decode(0, query[130:], key[130:], value[130:], 130, return_lse=True)

    assert filled_in.output.dtype == step.output.dtype == numpy.dtype(dtype)
    assert error(filled_in.output, expected[:130]) <= tolerance
    assert error(step.output, expected[130:]) <= tolerance
    assert numpy.abs(filled_in.lse - expected_lse[:130]).max() <= 1e-3
    assert numpy.abs(step.lse - expected_lse[130:]).max() <= 1e-3
    assert (filled_in.length, step.length) == (130, 131)
    assert step.generation > filled_in.generation


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp32"])
def test_torch_in_torch_out(client, rng, kv_dtype):
    torch = pytest.importorskip("torch")
    context = make_context(client, kv_dtype=kv_dtype)
    dtype = torch.bfloat16 if kv_dtype == "bf16" else torch.float32
    query, key, value = (
        torch.from_numpy(rows(rng, 70, heads, DIM)).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    expected, _ = attend(*(array.float().numpy() for array in (query, key, value)), 0)

    result = context.prefill(1, query, key, value, 0, return_lse=True)

    assert result.output.dtype == dtype
    assert result.lse.dtype == torch.float32
    assert error(result.output.float().numpy(), expected) <= TOLERANCE[kv_dtype]


def test_a_transposed_tensor_is_sent_in_row_major_order(client, rng):
    torch = pytest.importorskip("torch")
    context, key, value = filled(client, rng)
    query = torch.from_numpy(rows(rng, 1, HEADS, DIM))
    strided = query.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not strided.is_contiguous()
    answer = context.decode(0, strided).output.numpy()
    assert error(answer, attend(query.numpy(), key, value, 199)[0]) <= TOLERANCE["fp32"]


def test_value_heads_of_another_size_scale_and_window(client, rng):
    method = longspan.parse_method(
        'name: "near" branches { selection { kind: KIND_NONE } mask { window_tokens: 40 } }'
    )
    context = make_context(client, value_head_dim=128, scale=0.05, methods=[method])
    query, key = rows(rng, 90, HEADS, DIM), rows(rng, 90, KV_HEADS, DIM)
    value = rows(rng, 90, KV_HEADS, 128)
    result = context.prefill(0, query, key, value)
    expected, _ = attend(query, key, value, 0, scale=0.05, window=40)
    assert result.output.shape == (90, HEADS, 128)
    assert error(result.output, expected) <= TOLERANCE["fp32"]


def test_a_long_prefill_travels_in_chunks(client, rng, monkeypatch):
    context, other = make_context(client), make_context(client)
    tokens = 150
    query = rows(rng, tokens, HEADS, DIM)
    key, value = rows(rng, tokens, KV_HEADS, DIM), rows(rng, tokens, KV_HEADS, DIM)
    whole = context.prefill(0, query, key, value, 0, return_lse=True)

    chunk_bytes = 17 * 4 * DIM * (HEADS + 2 * KV_HEADS)
    monkeypatch.setattr(context_module, "_PREFILL_CHUNK_BYTES", chunk_bytes)
    sent = []
    send = streams_module.PrefillStream.send_wires
    monkeypatch.setattr(
        streams_module.PrefillStream,
        "send_wires",
        lambda self, *arguments: sent.append(arguments) or send(self, *arguments),
    )
    cut = other.prefill(0, query, key, value, 0, return_lse=True)

    assert len(sent) == -(-tokens // 17)
    assert error(cut.output, whole.output) <= TOLERANCE["fp32"]
    assert cut.lse.shape == whole.lse.shape == (tokens, HEADS)
    assert cut.length == tokens


def test_prefill_of_stored_tokens_writes_nothing(client, rng):
    context, key, value = filled(client, rng)
    before = context.info().generation
    query = rows(rng, 5, HEADS, DIM)
    result = context.prefill(0, query, start_pos=100)
    assert error(result.output, attend(query, key, value, 100)[0]) <= TOLERANCE["fp32"]
    assert context.info().generation == before


def test_decode_of_several_contexts_fails_item_by_item(client, rng):
    first, key, value = filled(client, rng)
    second, *_ = filled(client, rng, tokens=64)
    query = rows(rng, 1, HEADS, DIM)
    items = [
        longspan.DecodeItem(first, 0, query),
        longspan.DecodeItem(client.context("nowhere"), 0, query),
        longspan.DecodeItem(second, 7, query),
        longspan.DecodeItem(second, 1, query, return_lse=True),
    ]
    answers = client.decode(items, return_errors=True)
    assert error(answers[0].output, attend(query, key, value, 199)[0]) <= TOLERANCE["fp32"]
    assert answers[1].code == grpc.StatusCode.NOT_FOUND
    assert answers[2].code == grpc.StatusCode.INVALID_ARGUMENT
    assert answers[3].lse.shape == (1, HEADS)
    assert refusal(lambda: client.decode(items)).code == grpc.StatusCode.NOT_FOUND


# ---- Streams ------------------------------------------------------------------------------------


def test_an_append_stream_shows_everything_at_its_end(client, rng):
    context = make_context(client)
    key, value = rows(rng, 3000, KV_HEADS, DIM), rows(rng, 3000, KV_HEADS, DIM)
    with context.append_stream() as stream:
        for layer in range(2):
            stream.write(layer, 0, key[:1700], value[:1700])
            stream.write(layer, 1700, key[1700:], value[1700:])
        assert context.info().committed_length == 0
    assert stream.result.committed_length == 3000
    assert list(stream.result.layer_lengths) == [3000, 3000]
    query = rows(rng, 1, HEADS, DIM)
    answer = context.decode(1, query).output
    assert error(answer, attend(query, key, value, 2999)[0]) <= TOLERANCE["fp32"]


def test_an_append_stream_left_by_an_exception_leaves_no_trace(client, rng):
    context = make_context(client)
    key = rows(rng, 100, KV_HEADS, DIM)
    with pytest.raises(ZeroDivisionError), context.append_stream() as stream:
        stream.write(0, 0, key, key)
        raise ZeroDivisionError
    # The next append begins at the old length, whatever the broken one had staged.
    other = rows(rng, 10, KV_HEADS, DIM)
    assert context.append(0, other, other, 0).layer_lengths[0] == 10


def test_a_refused_append_stream_raises_instead_of_blocking(client, rng):
    context = make_context(client)
    wrong = rows(rng, 4000, KV_HEADS + 1, DIM)

    def write_for_ever():
        with context.append_stream() as stream:
            for _ in range(1000):
                stream.write(0, 0, wrong, wrong)

    failure = refusal(write_for_ever)
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
    assert failure.field_violations


def test_a_prefill_stream_serves_all_layers_and_survives_a_bad_chunk(client, rng):
    context = make_context(client)
    query = rows(rng, 60, HEADS, DIM)
    key, value = rows(rng, 60, KV_HEADS, DIM), rows(rng, 60, KV_HEADS, DIM)
    expected, expected_lse = attend(query, key, value, 0)
    with context.prefill_stream(return_lse=True) as stream:
        for begin in (0, 30):
            part = slice(begin, begin + 30)
            for layer in range(2):
                result = stream.step(layer, query[part], key[part], value[part], begin)
                assert error(result.output, expected[part]) <= TOLERANCE["fp32"]
                assert numpy.abs(result.lse - expected_lse[part]).max() <= 1e-3
        gap = refusal(lambda: stream.step(0, query, key, value, 1000))
        assert gap.code == grpc.StatusCode.OUT_OF_RANGE
        assert gap.metadata["expected_pos"] == "60"
        again = stream.step(0, query[:7], start_pos=0)
        assert error(again.output, expected[:7]) <= TOLERANCE["fp32"]


def test_a_decode_stream_pipelines_up_to_its_window(client, rng):
    first, key, value = filled(client, rng)
    second, *_ = filled(client, rng)
    queries = [rows(rng, 1, HEADS, DIM) for _ in range(3)]
    with client.decode_stream([first, second], window=3) as stream:
        assert stream.window == 3
        for query in queries:
            stream.send(
                [longspan.DecodeItem(first, 0, query), longspan.DecodeItem(second, 0, query)]
            )
        with pytest.raises(RuntimeError, match="3 steps are in flight"):
            stream.send([])
        for query in queries:
            answers = stream.receive()
            assert len(answers) == 2
            expected = attend(query, key, value, 199)[0]
            assert error(answers[0].output, expected) <= TOLERANCE["fp32"]
        outsider = filled(client, rng)[0]
        failed = refusal(lambda: stream.step([longspan.DecodeItem(outsider, 0, queries[0])]))
        assert failed.code in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.FAILED_PRECONDITION,
        )
        assert stream.step([longspan.DecodeItem(second, 1, queries[0])])[0].length == 200


# ---- Life cycle ---------------------------------------------------------------------------------


def test_fork_truncate_and_delete(client, rng):
    context, key, value = filled(client, rng)
    child = context.fork(150, "child-of-" + context.id)
    assert child.info().committed_length == 150
    tail = rows(rng, 10, KV_HEADS, DIM)
    child.append(0, tail, tail, 150)
    query = rows(rng, 1, HEADS, DIM)
    joined_key = numpy.concatenate([key[:150], tail])
    joined_value = numpy.concatenate([value[:150], tail])
    expected = attend(query, joined_key, joined_value, 159)[0]
    assert error(child.decode(0, query).output, expected) <= TOLERANCE["fp32"]
    expected = attend(query, key, value, 199)[0]
    assert error(context.decode(0, query).output, expected) <= TOLERANCE["fp32"]

    assert list(context.truncate(64).layer_lengths) == [64, 64]
    expected = attend(query, key[:64], value[:64], 63)[0]
    assert error(context.decode(0, query).output, expected) <= TOLERANCE["fp32"]

    context.delete()
    assert refusal(context.info).code == grpc.StatusCode.NOT_FOUND
    assert refusal(context.delete).code == grpc.StatusCode.NOT_FOUND
    context.delete(allow_missing=True)
    assert child.info().committed_length == 150


def test_create_is_idempotent_for_an_equal_spec(client):
    first = make_context(client, context_id="same", labels={"run": "7"})
    second = make_context(client, context_id="same", labels={"run": "7"})
    assert first.info() == second.info()
    taken = refusal(lambda: make_context(client, context_id="same", kv_dtype="fp16"))
    assert taken.code == grpc.StatusCode.ALREADY_EXISTS


def test_contexts_are_listed_over_all_pages(client):
    made = {make_context(client, labels={"n": str(n)}).id for n in range(5)}
    assert {context.context_id for context in client.contexts(page_size=2)} == made


def test_a_lease_is_renewed(client):
    context = make_context(client, ttl=100)
    assert 90 < context.keep_alive() <= 100
    assert make_context(client).keep_alive() is None
    gone = refusal(client.context("nowhere").keep_alive)
    assert gone.code == grpc.StatusCode.NOT_FOUND


def test_writes_can_be_repeated(client, rng):
    context, key, value = filled(client, rng)
    before = context.info()
    context.append(0, key, value, 0)
    assert context.info().layer_lengths == before.layer_lengths
    different = refusal(lambda: context.append(0, key + 1, value, 0))
    assert different.code == grpc.StatusCode.ABORTED
    gap = refusal(lambda: context.append(0, key, value, 201))
    assert (gap.code, gap.metadata["expected_pos"]) == (grpc.StatusCode.OUT_OF_RANGE, "200")
    stale = refusal(lambda: context.truncate(1, expected_generation=before.generation + 99))
    assert stale.code == grpc.StatusCode.ABORTED


# ---- Methods ------------------------------------------------------------------------------------


def test_methods_by_name_by_message_and_by_file(client, rng, tmp_path):
    shipped = client.methods
    assert {"dense", "quest", "window"} <= set(shipped)
    path = tmp_path / "mine.txtpb"
    path.write_text("branches { selection { kind: KIND_NONE } mask { window_tokens: 16 } }")
    mine = longspan.load_method(path)
    assert mine.name == "mine"
    context, key, value = filled(client, rng, methods=["dense", shipped["window"], mine])
    query = rows(rng, 1, HEADS, DIM)
    near = attend(query, key, value, 199, window=16)[0]
    assert error(context.decode(0, query, method="mine").output, near) <= TOLERANCE["fp32"]
    assert error(context.decode(0, query, method=mine).output, near) <= TOLERANCE["fp32"]
    everything = attend(query, key, value, 199)[0]
    assert error(context.decode(0, query).output, everything) <= TOLERANCE["fp32"]

    mine.branches[0].summary.kind = 2
    mine.branches[0].summary.block_tokens = 64
    mine.branches[0].selection.kind = 3
    mine.branches[0].selection.block_tokens = 64
    mine.branches[0].budget.both.blocks = 2
    missing = refusal(lambda: context.decode(0, query, method=mine))
    assert missing.code == grpc.StatusCode.FAILED_PRECONDITION

    with pytest.raises(ValueError, match="no method 'nonsense'; it ships .*quest"):
        make_context(client, methods=["nonsense"])
    with pytest.raises(ValueError, match="not a method: 1:"):
        longspan.parse_method("branches { nonsense: 3 }")


def test_check_spec_lists_every_reason(client):
    assert not client.check_spec(client.make_spec(**SHAPE)).reasons
    wrong = client.make_spec(**{**SHAPE, "num_kv_heads": 3, "head_dim": 0})
    fields = {reason.field for reason in client.check_spec(wrong).reasons}
    assert any("num_kv_heads" in field for field in fields)
    assert any("key_head_dim" in field for field in fields)


def test_explain_compares_with_dense(client, rng):
    context, *_ = filled(client, rng, tokens=600, methods=["dense", "window"])
    window = client.methods["window"]
    window.branches[0].mask.window_tokens = 64
    window.branches[0].mask.sink_tokens = 4
    query = rows(rng, 2, HEADS, DIM)
    whole = context.explain(0, query, method="dense", compare_with_dense=True)
    assert whole.recall.shape == whole.relative_error.shape == (2, HEADS)
    assert numpy.all(numpy.abs(whole.recall - 1) < 1e-3)
    assert whole.read_fraction == pytest.approx(1)

    part = context.explain(0, query, method=window, compare_with_dense=True)
    assert part.method == "window"
    assert numpy.all(part.recall < 0.9) and numpy.all(part.relative_error > 1e-3)
    assert part.read_fraction == pytest.approx(68 / 600, rel=0.02)
    selection = part.selections[0]
    assert (selection.position, selection.num_tokens) == (598, 68)
    covered = sorted(token for span in selection.spans for token in range(span.begin, span.end))
    assert covered == [0, 1, 2, 3, *range(598 - 63, 599)]
    assert context.explain(0, query, method="dense").recall is None


# ---- Errors -------------------------------------------------------------------------------------


def test_what_cannot_be_sent_is_refused_before_it_is_sent(client, rng):
    context, *_ = filled(client, rng)
    with pytest.raises(TypeError, match="query has type float64"):
        context.decode(0, numpy.zeros((1, HEADS, DIM)))
    with pytest.raises(TypeError, match="query is a list"):
        context.decode(0, [[1.0]])
    with pytest.raises(ValueError, match="different numbers of tokens"):
        context.prefill(0, rows(rng, 2, HEADS, DIM), rows(rng, 3, KV_HEADS, DIM))
    with pytest.raises(ValueError, match="kv_dtype is 'int8'"):
        make_context(client, kv_dtype="int8")
    with pytest.raises(ValueError, match="layout is 'round'"):
        make_context(client, layout="round")


def test_errors_carry_their_details(client, rng):
    context, *_ = filled(client, rng)
    query = rows(rng, 1, HEADS, DIM)
    query[0, 2, 5] = numpy.nan
    failure = refusal(lambda: context.decode(0, query))
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
    assert failure.reason
    assert any("query" in violation.field for violation in failure.field_violations)
    assert "INVALID_ARGUMENT" in str(failure)


def test_a_closed_client_says_so(server):
    client = longspan.Client(server.address)
    client.close()
    with pytest.raises(ValueError):
        client.capabilities()
