"""Streams as context managers: bulk appends, chunked prefill, pipelined decode.

Each belongs to one thread at a time. Leaving the `with` block by an exception cancels the stream.
"""

from __future__ import annotations

import collections
import itertools
import threading
import typing

import grpc

from longspan import results, tensors
from longspan.errors import Error, from_rpc_error
from longspan.v1 import attention_pb2

# Messages of about this size move the most bytes a second through gRPC over TCP.
APPEND_CHUNK_BYTES = 512 << 10
# Written messages that wait for gRPC's sender thread.
_QUEUE_LENGTH = 8


class Requests:
    """The request iterator of one stream: `put` blocks while the queue is full, and returns False
    once the call has ended, so that a writer never waits for a dead stream."""

    def __init__(self):
        self._condition = threading.Condition()
        self._queue = collections.deque()
        self._closed = False
        self._call_ended = False

    def put(self, message) -> bool:
        with self._condition:
            self._condition.wait_for(lambda: len(self._queue) < _QUEUE_LENGTH or self._call_ended)
            if self._call_ended:
                return False
            self._queue.append(message)
            self._condition.notify_all()
            return True

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def call_ended(self) -> None:
        with self._condition:
            self._call_ended = True
            self._condition.notify_all()

    def __iter__(self):
        return self

    def __next__(self):
        with self._condition:
            self._condition.wait_for(lambda: self._queue or self._closed or self._call_ended)
            if not self._queue or self._call_ended:
                raise StopIteration
            message = self._queue.popleft()
            self._condition.notify_all()
            return message


class _Stream:
    """One call with its request queue."""

    def __init__(self, method, timeout: float | None, first_message):
        self._requests = Requests()
        self._requests.put(first_message)
        self._call = method(self._requests, timeout=timeout)
        if not self._call.add_callback(self._requests.call_ended):
            self._requests.call_ended()

    def _send(self, message) -> None:
        if not self._requests.put(message):
            raise self._failure()

    def _failure(self) -> Exception:
        if self._call.code() == grpc.StatusCode.OK:
            return RuntimeError("the stream has ended; open a new one")
        return from_rpc_error(self._call)

    def cancel(self) -> None:
        """Ends the stream at once; an append that is not finished leaves no trace."""
        self._call.cancel()
        self._requests.close()

    def __enter__(self):
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        if exception_type is None:
            self.close()
        else:
            self.cancel()

    def close(self) -> None:
        raise NotImplementedError


class AppendStream(_Stream):
    """Bulk append to one context. Nothing is visible before the block is left; then all of it, and
    `result` (an AppendResponse) tells the committed length, the layers' lengths and generation."""

    def __init__(
        self,
        method,
        timeout: float | None,
        context_id: str,
        expected_generation: int,
        chunk_bytes: int,
    ):
        header = attention_pb2.AppendRequest.Header(
            context_id=context_id, expected_generation=expected_generation
        )
        super().__init__(method, timeout, attention_pb2.AppendRequest(header=header))
        self._chunk_bytes = chunk_bytes
        self.result: attention_pb2.AppendResponse | None = None

    def write(self, layer: int, start_pos: int, key, value) -> None:
        """key [tokens, kv_heads, key_head_dim] and value [tokens, kv_heads, value_head_dim] at
        positions start_pos and up. Any number of tokens; cut to chunks that suit gRPC."""
        wire_key, wire_value = tensors.to_wire("key", key), tensors.to_wire("value", value)
        num_tokens = len(wire_key.rows)
        if len(wire_value.rows) != num_tokens:
            raise ValueError(f"key has {num_tokens} tokens and value {len(wire_value.rows)}")
        step = max(1, self._chunk_bytes // max(1, wire_key.row_bytes + wire_value.row_bytes))
        # One chunk even for no tokens: the server is the one to judge them.
        for begin in range(0, max(1, num_tokens), step):
            request = attention_pb2.AppendRequest()
            request.chunk.layer = layer
            request.chunk.start_pos = start_pos + begin
            wire_key.cut(begin, begin + step).fill(request.chunk.key)
            wire_value.cut(begin, begin + step).fill(request.chunk.value)
            self._send(request)

    def close(self) -> None:
        """Commits: waits until the server shows what was written."""
        self._requests.close()
        try:
            self.result = self._call.result()
        except grpc.RpcError as failure:
            raise from_rpc_error(failure) from None


class PrefillStream(_Stream):
    """Chunks of any layers of one context, answered in order. `step` is for engines, which need a
    layer's output before the next layer's query; `send` and `receive` pipeline known chunks."""

    def __init__(self, method, timeout: float | None, context_id: str, options):
        header = attention_pb2.PrefillRequest.Header(context_id=context_id, options=options)
        super().__init__(method, timeout, attention_pb2.PrefillRequest(header=header))
        self._numbers = itertools.count(1)
        self._sent: collections.deque = collections.deque()

    def send(
        self, layer: int, query, key=None, value=None, start_pos=0, gates=None, search_query=None
    ) -> int:
        """Shapes as in Context.prefill; one chunk, not cut. Returns its number."""
        wires = tensors.all_to_wire(
            query=query, key=key, value=value, gates=gates, search_query=search_query
        )
        return self.send_wires(layer, wires, start_pos, query)

    def send_wires(self, layer: int, wires: dict, start_pos: int, like) -> int:
        """The same with converted tensors; the output will be an array like `like`."""
        request = attention_pb2.PrefillRequest()
        number = next(self._numbers)
        request.chunk.seq = number
        request.chunk.layer = layer
        request.chunk.start_pos = start_pos
        results.set_tensors(request.chunk, wires)
        self._send(request)
        self._sent.append((number, like))
        return number

    def receive(self) -> results.AttentionResult:
        """The answer to the oldest chunk without one. Its Error leaves the stream usable."""
        if not self._sent:
            raise RuntimeError("every chunk that was sent has been answered")
        response = _next(self._call)
        number, query = self._sent.popleft()
        if response.seq != number:
            raise RuntimeError(f"the server answered chunk {response.seq} instead of {number}")
        if response.status.code:
            raise Error(response.status)
        return results.attention_result(response, query)

    def step(
        self, layer: int, query, key=None, value=None, start_pos=0, gates=None, search_query=None
    ) -> results.AttentionResult:
        """Sends one chunk and waits for its answer."""
        self.send(layer, query, key, value, start_pos, gates, search_query)
        return self.receive()

    def close(self) -> None:
        """Reads and drops the answers that nobody received."""
        self._requests.close()
        _drain(self._call)


class DecodeStream(_Stream):
    """A decode session over fixed contexts. At most `window` steps are in flight."""

    def __init__(self, method, timeout: float | None, context_ids: list[str], window: int):
        opening = attention_pb2.DecodeStreamRequest.Open(context_ids=context_ids, window=window)
        super().__init__(method, timeout, attention_pb2.DecodeStreamRequest(open=opening))
        self._numbers = itertools.count(1)
        self._sent: collections.deque = collections.deque()
        self.window = _next(self._call).opened.window

    def send(self, items: typing.Sequence[results.DecodeItem]) -> int:
        """Sends a step without waiting. RuntimeError when the window is full: receive first."""
        if self.window and len(self._sent) >= self.window:
            raise RuntimeError(f"{self.window} steps are in flight, the most; receive one first")
        step = attention_pb2.DecodeStreamRequest.Step(
            seq=next(self._numbers), items=[results.decode_item(item) for item in items]
        )
        self._send(attention_pb2.DecodeStreamRequest(step=step))
        self._sent.append((step.seq, [item.query for item in items]))
        return step.seq

    def receive(self, return_errors: bool = False) -> list[results.AttentionResult | Error]:
        """Results of the oldest step without an answer, one an item. The first failed item's Error
        is raised, or with return_errors stands in the list."""
        if not self._sent:
            raise RuntimeError("every step that was sent has been answered")
        response = _next(self._call).result
        number, queries = self._sent.popleft()
        if response.seq != number:
            raise RuntimeError(f"the server answered step {response.seq} instead of {number}")
        if response.status.code:
            raise Error(response.status)
        answers = decode_answers(response.results, queries)
        if not return_errors:
            raise_first(answers)
        return answers

    def step(
        self, items: typing.Sequence[results.DecodeItem], return_errors: bool = False
    ) -> list[results.AttentionResult | Error]:
        """Sends one step and waits for its results. With steps in flight use send and receive."""
        if self._sent:
            raise RuntimeError("steps are in flight: receive them before calling step")
        self.send(items)
        return self.receive(return_errors)

    def close(self) -> None:
        """Reads and drops the results that nobody received."""
        self._requests.close()
        _drain(self._call)


def decode_answers(messages, queries) -> list[results.AttentionResult | Error]:
    """DecodeResults as results or Errors, in order."""
    return [
        Error(message.status) if message.status.code else results.attention_result(message, query)
        for message, query in zip(messages, queries, strict=True)
    ]


def raise_first(answers) -> None:
    """Raises the first Error among the answers, if any."""
    for answer in answers:
        if isinstance(answer, Error):
            raise answer


def _next(call):
    try:
        return next(call)
    except StopIteration:
        raise RuntimeError("the server ended the stream") from None
    except grpc.RpcError as failure:
        raise from_rpc_error(failure) from None


def _drain(call) -> None:
    try:
        for _ in call:
            pass
    except grpc.RpcError as failure:
        raise from_rpc_error(failure) from None
