"""The service as its messages: stubs, tensors and error details, without the client library."""

import contextlib
import typing

import grpc
import numpy
from google.rpc import error_details_pb2, status_pb2
from longspan.v1 import (
    attention_pb2 as attention,
    attention_pb2_grpc,
    context_pb2 as context,
    context_pb2_grpc,
    introspect_pb2_grpc,
    method_pb2 as method,
    server_pb2_grpc,
    tensor_pb2 as tensor,
)

LAYERS, QUERY_HEADS, KV_HEADS, DIM = 2, 4, 2, 64


class Stubs:
    """Every service on one channel of its own."""

    def __init__(self, address: str):
        self.channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", 64 << 20),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_retries", 0),
            ],
        )
        self.attention = attention_pb2_grpc.AttentionServiceStub(self.channel)
        self.contexts = context_pb2_grpc.ContextServiceStub(self.channel)
        self.introspect = introspect_pb2_grpc.IntrospectServiceStub(self.channel)
        self.server = server_pb2_grpc.ServerServiceStub(self.channel)

    def close(self):
        self.channel.close()

    def create(self, spec=None, context_id="", request_id=""):
        """The context that was made."""
        request = context.CreateContextRequest(
            context_id=context_id, request_id=request_id, spec=spec or spec_of()
        )
        return self.contexts.CreateContext(request).context

    def get(self, context_id):
        return self.contexts.GetContext(context.GetContextRequest(context_id=context_id)).context

    def append(self, context_id, chunks, expected_generation=0):
        return self.attention.Append(append_requests(context_id, chunks, expected_generation))

    def fill(self, rng, context_id, num_tokens, start_pos=0):
        """Random keys and values [layers][tokens, heads, dim] in every layer."""
        keys = rng.standard_normal((LAYERS, num_tokens, KV_HEADS, DIM), numpy.float32)
        values = rng.standard_normal((LAYERS, num_tokens, KV_HEADS, DIM), numpy.float32)
        chunks = [
            chunk(layer, start_pos + begin, keys[layer, begin:end], values[layer, begin:end])
            for layer in range(LAYERS)
            for begin in range(0, num_tokens, 1024)
            for end in [min(begin + 1024, num_tokens)]
        ]
        self.append(context_id, chunks)
        return keys, values

    def decode_one(self, item):
        return self.attention.Decode(attention.DecodeRequest(items=[item])).results[0]


def spec_of(**changes):
    fields = dict(
        num_layers=LAYERS,
        num_query_heads=QUERY_HEADS,
        num_kv_heads=KV_HEADS,
        key_head_dim=DIM,
        kv_dtype=tensor.DATA_TYPE_FP32,
    )
    return context.ContextSpec(**{**fields, **changes})


def block_method(name="blocks", block_tokens=64):
    """Top 2 blocks by mean keys: a method that needs a summary."""
    return method.Method(
        name=name,
        branches=[
            method.Branch(
                summary=method.Summary(kind=method.Summary.KIND_MEAN, block_tokens=block_tokens),
                selection=method.Selection(
                    kind=method.Selection.KIND_TOP_K, block_tokens=block_tokens
                ),
                budget=method.Budget(both=method.Budget.Amount(blocks=2)),
            )
        ],
    )


def fp32(array) -> tensor.Tensor:
    array = numpy.ascontiguousarray(array, numpy.float32)
    return tensor.Tensor(dtype=tensor.DATA_TYPE_FP32, shape=array.shape, raw=array.tobytes())


def array_of(message: tensor.Tensor):
    assert message.dtype == tensor.DATA_TYPE_FP32
    return numpy.frombuffer(message.raw, numpy.float32).reshape(message.shape)


def chunk(layer, start_pos, key, value):
    return attention.AppendRequest.Chunk(
        layer=layer, start_pos=start_pos, key=fp32(key), value=fp32(value)
    )


def append_requests(context_id, chunks, expected_generation=0):
    header = attention.AppendRequest.Header(
        context_id=context_id, expected_generation=expected_generation
    )
    yield attention.AppendRequest(header=header)
    for one in chunks:
        yield attention.AppendRequest(chunk=one)


def query_of(rng, num_rows=1):
    return rng.standard_normal((num_rows, QUERY_HEADS, DIM), numpy.float32)


def item(context_id, query, layer=0, **fields):
    return attention.DecodeItem(context_id=context_id, layer=layer, query=fp32(query), **fields)


def dense_attention(query, keys, values, first_position):
    """Causal attention of rows at first_position, …, in double precision."""
    group = query.shape[1] // keys.shape[1]
    out = numpy.empty((query.shape[0], query.shape[1], values.shape[2]))
    for row in range(query.shape[0]):
        seen = first_position + row + 1
        for head in range(query.shape[1]):
            scores = keys[:seen, head // group].astype(float) @ query[row, head].astype(float)
            weights = numpy.exp((scores - scores.max()) / numpy.sqrt(query.shape[2]))
            out[row, head] = weights @ values[:seen, head // group].astype(float) / weights.sum()
    return out


def assert_close(actual, expected, tolerance=1e-4):
    assert numpy.isfinite(actual).all()
    error = numpy.linalg.norm(actual - expected) / numpy.linalg.norm(expected)
    assert error <= tolerance, f"relative error {error}"


class Details(typing.NamedTuple):
    """A google.rpc.Status, unpacked."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict
    fields: list
    retry_seconds: float | None
    quota: list


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def unpack(status: status_pb2.Status) -> Details:
    reason, metadata, fields, retry, quota = "", {}, [], None, []
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            assert info.domain == "longspan"
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest.FromString(detail.value)
            fields = [violation.field for violation in bad.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry = delay.seconds + delay.nanos * 1e-9
        elif detail.Is(error_details_pb2.QuotaFailure.DESCRIPTOR):
            failure = error_details_pb2.QuotaFailure.FromString(detail.value)
            quota = [violation.subject for violation in failure.violations]
    return Details(_CODES[status.code], status.message, reason, metadata, fields, retry, quota)


def details_of(error: grpc.RpcError) -> Details:
    """The status of a call that failed, with what came in its trailing metadata."""
    trailing = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    assert _CODES[status.code] == error.code()
    return unpack(status)


@contextlib.contextmanager
def refused(code: grpc.StatusCode):
    """The body must fail with this code; yields a list that will hold the details."""
    found: list[Details] = []
    try:
        yield found
    except grpc.RpcError as error:
        found.append(details_of(error))
        assert found[0].code == code, found[0]
        assert found[0].reason, "every error has a reason"
        return
    raise AssertionError(f"the call was not refused with {code}")


def failed(result, code: grpc.StatusCode) -> Details:
    """The details of a result that failed in-band."""
    details = unpack(result.status)
    assert details.code == code, details
    assert details.reason
    return details
