"""One context: a sequence's KV cache on the server, and attention over it.

Shapes: query and search_query [tokens, query_heads, head_dim]; key [tokens, kv_heads, head_dim];
value [tokens, kv_heads, value_head_dim]; gates fp32 [tokens, query_heads, branches]. Keys arrive
position-encoded. `method` is the name of one of the context's methods, a Method message, or None for
the context's default.
"""

from __future__ import annotations

import typing

import numpy

from longspan import results, streams, tensors
from longspan.errors import Error
from longspan.v1 import attention_pb2, context_pb2, introspect_pb2
from longspan.v1.method_pb2 import Method

if typing.TYPE_CHECKING:
    from longspan.client import Client

# Bytes of one prefill chunk: it and its answer stay well under gRPC's message limit.
_PREFILL_CHUNK_BYTES = 8 << 20


class Context:
    """A handle; cheap, and valid as long as the server holds the context. Made by Client."""

    def __init__(self, client: Client, context_id: str):
        self._client = client
        self.id = context_id

    def __repr__(self) -> str:
        return f"Context({self.id!r})"

    # ---- Life cycle -----------------------------------------------------------------------------

    def info(self) -> context_pb2.Context:
        """Spec, lengths, generation, bytes and lease."""
        request = context_pb2.GetContextRequest(context_id=self.id)
        return self._client.unary(self._client.context_stub.GetContext, request).context

    def fork(
        self, num_tokens: int, new_id: str | None = None, expected_generation: int = 0
    ) -> Context:
        """A new context that shares the first `num_tokens` copy-on-write."""
        request = context_pb2.ForkContextRequest(
            context_id=self.id,
            new_context_id=new_id or "",
            num_tokens=num_tokens,
            expected_generation=expected_generation,
            request_id=self._client.request_id(),
        )
        response = self._client.unary(self._client.context_stub.ForkContext, request)
        return Context(self._client, response.context.context_id)

    def truncate(self, num_tokens: int, expected_generation: int = 0) -> context_pb2.Context:
        """Keeps tokens [0, num_tokens) of every layer."""
        request = context_pb2.TruncateContextRequest(
            context_id=self.id, num_tokens=num_tokens, expected_generation=expected_generation
        )
        return self._client.unary(self._client.context_stub.TruncateContext, request).context

    def delete(self, allow_missing: bool = False, expected_generation: int = 0) -> None:
        """Frees everything that no other context shares."""
        request = context_pb2.DeleteContextRequest(
            context_id=self.id, allow_missing=allow_missing, expected_generation=expected_generation
        )
        self._client.unary(self._client.context_stub.DeleteContext, request)

    def keep_alive(self) -> float | None:
        """Renews the lease; seconds until it ends, None when the context never expires."""
        request = context_pb2.KeepAliveRequest(context_ids=[self.id])

        def attempt(timeout):
            for response in self._client.context_stub.KeepAlive(iter([request]), timeout=timeout):
                lease = response.leases[0]
                if lease.status.code:
                    raise Error(lease.status)
                if not lease.HasField("remaining"):
                    return None
                return lease.remaining.seconds + lease.remaining.nanos * 1e-9
            raise RuntimeError("the server ended the stream without an answer")

        return self._client.retries.call(attempt)

    # ---- Keys and values ------------------------------------------------------------------------

    def append(
        self, layer: int, key, value, start_pos: int, expected_generation: int = 0
    ) -> attention_pb2.AppendResponse:
        """Stores tokens of one layer, all or nothing. Repeating a write is harmless."""

        def attempt(timeout):
            stream = self._append_stream(expected_generation, timeout)
            with stream:
                stream.write(layer, start_pos, key, value)
            return stream.result

        return self._client.retries.call(attempt)

    def append_stream(
        self, expected_generation: int = 0, timeout: float | None = 3600.0
    ) -> streams.AppendStream:
        """For bulk: `with context.append_stream() as stream: stream.write(layer, pos, key, value)`.
        Visible when the block is left, not at all when it is left by an exception."""
        return self._append_stream(expected_generation, timeout)

    def _append_stream(self, expected_generation, timeout):
        limit = self._client.limits.max_chunk_bytes or streams.APPEND_CHUNK_BYTES
        return streams.AppendStream(
            self._client.attention_stub.Append.future,
            timeout,
            self.id,
            expected_generation,
            min(limit, streams.APPEND_CHUNK_BYTES),
        )

    # ---- Attention ------------------------------------------------------------------------------

    def prefill(
        self,
        layer: int,
        query,
        key=None,
        value=None,
        start_pos: int = 0,
        method: str | Method | None = None,
        gates=None,
        search_query=None,
        return_lse: bool = False,
        return_selection: bool = False,
    ) -> results.AttentionResult:
        """Attention of many rows, the first at start_pos; each sees the tokens up to its own. Keys
        and values are stored first; leave both out when the context holds them already. Long inputs
        travel in several chunks."""
        wires = tensors.all_to_wire(
            query=query, key=key, value=value, gates=gates, search_query=search_query
        )
        lengths = {field: len(wire.rows) for field, wire in wires.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"tensors of different numbers of tokens: {lengths}")
        options = results.options(method, return_lse, return_selection)
        step = self._prefill_step(wires)
        begins = range(0, max(1, lengths["query"]), step)
        answers: list[results.AttentionResult] = []

        def attempt(timeout):
            # Chunks that were answered before a refusal are not sent again. One chunk is on its way
            # while another is computed.
            with self._prefill_stream(options, timeout) as stream:
                remaining = begins[len(answers) :]
                for index, begin in enumerate(remaining):
                    cut = {field: wire.cut(begin, begin + step) for field, wire in wires.items()}
                    stream.send_wires(layer, cut, start_pos + begin, query)
                    if index > 0:
                        answers.append(stream.receive())
                answers.append(stream.receive())

        self._client.retries.call(attempt)
        return results.join(answers)

    def _prefill_step(self, wires) -> int:
        """Rows of a chunk: within the server's limit, and small beside the message limit."""
        row_bytes = sum(wire.row_bytes for wire in wires.values())
        rows = max(1, _PREFILL_CHUNK_BYTES // max(1, row_bytes))
        limit = self._client.limits.max_prefill_rows
        return min(rows, limit) if limit else rows

    def prefill_stream(
        self,
        method: str | Method | None = None,
        return_lse: bool = False,
        return_selection: bool = False,
        timeout: float | None = None,
    ) -> streams.PrefillStream:
        """Many chunks over all layers on one stream; see PrefillStream."""
        return self._prefill_stream(results.options(method, return_lse, return_selection), timeout)

    def _prefill_stream(self, options, timeout):
        return streams.PrefillStream(self._client.attention_stub.Prefill, timeout, self.id, options)

    def decode(
        self,
        layer: int,
        query,
        key=None,
        value=None,
        start_pos: int | None = None,
        method: str | Method | None = None,
        gates=None,
        search_query=None,
        return_lse: bool = False,
        return_selection: bool = False,
        expected_generation: int = 0,
    ) -> results.AttentionResult:
        """Attention of one or a few tokens. With keys and values: stored at start_pos first. Without
        them start_pos is the first query's position; None means the layer's last tokens."""
        item = results.DecodeItem(
            context=self,
            layer=layer,
            query=query,
            key=key,
            value=value,
            start_pos=start_pos,
            gates=gates,
            search_query=search_query,
            method=method,
            return_lse=return_lse,
            return_selection=return_selection,
            expected_generation=expected_generation,
        )
        return self._client.decode([item])[0]

    def explain(
        self,
        layer: int,
        query,
        start_pos: int | None = None,
        method: str | Method | None = None,
        compare_with_dense: bool = False,
        gates=None,
        search_query=None,
    ) -> results.Explanation:
        """What a method selects for these queries, and on request how much of the dense attention
        mass that holds. Changes nothing."""
        request = introspect_pb2.ExplainRequest(
            context_id=self.id, layer=layer, compare_with_dense=compare_with_dense
        )
        if start_pos is not None:
            request.start_pos = start_pos
        if isinstance(method, Method):
            request.method.CopyFrom(method)
        elif method is not None:
            request.method_name = method
        wires = tensors.all_to_wire(query=query, gates=gates, search_query=search_query)
        results.set_tensors(request, wires)
        response = self._client.unary(self._client.introspect_stub.Explain, request)
        rows_heads = wires["query"].rows.shape[:2]

        def compared(values):
            if not compare_with_dense:
                return None
            return numpy.array(values, dtype=numpy.float32).reshape(rows_heads)

        return results.Explanation(
            selections=results.selections(response.selections),
            recall=compared(response.recall),
            relative_error=compared(response.relative_error),
            read_fraction=response.read_fraction,
            method=response.method_name,
        )
