"""A connection to a Longspan server. Thread-safe; one is enough for a process."""

from __future__ import annotations

import datetime
import functools
import typing
import uuid

import grpc

from longspan import results, streams, tensors
from longspan.context import Context
from longspan.errors import Error
from longspan.retries import Retries
from longspan.v1 import (
    attention_pb2,
    attention_pb2_grpc,
    context_pb2,
    context_pb2_grpc,
    introspect_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from longspan.v1.method_pb2 import Method

_LAYOUTS = {
    "block_cyclic": context_pb2.Layout.KIND_BLOCK_CYCLIC,
    "contiguous": context_pb2.Layout.KIND_CONTIGUOUS,
    "zigzag": context_pb2.Layout.KIND_ZIGZAG,
}
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_receive_message_length", 64 << 20),
    # The server takes pings down to 10 s apart; a dead peer is noticed within 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Attention is served inside a cluster: never through the web proxy of the environment.
    ("grpc.enable_http_proxy", 0),
]


class Client:
    """target: host:port. timeout: seconds for a call with all its repeats, None for no limit.
    retry_for: seconds during which a call is repeated that the server refuses for a while
    (UNAVAILABLE, or RESOURCE_EXHAUSTED with a retry delay); 0 never repeats."""

    def __init__(self, target: str, timeout: float | None = 60.0, retry_for: float = 10.0):
        self.target = target
        self.retries = Retries(timeout, retry_for)
        self._channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self.attention_stub = attention_pb2_grpc.AttentionServiceStub(self._channel)
        self.context_stub = context_pb2_grpc.ContextServiceStub(self._channel)
        self.introspect_stub = introspect_pb2_grpc.IntrospectServiceStub(self._channel)
        self.server_stub = server_pb2_grpc.ServerServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.target!r})"

    def close(self) -> None:
        """Ends the connection and every stream on it. Contexts stay on the server."""
        self._channel.close()

    def unary(self, method, request):
        """One unary call under this client's retries."""
        return self.retries.call(lambda timeout: method(request, timeout=timeout))

    def request_id(self) -> str:
        """Lets the server recognise a repeated request."""
        return uuid.uuid4().hex

    # ---- The server -----------------------------------------------------------------------------

    def capabilities(self) -> server_pb2.GetCapabilitiesResponse:
        """Version, backend, element types, head sizes, limits and shipped methods."""
        return self.unary(self.server_stub.GetCapabilities, server_pb2.GetCapabilitiesRequest())

    @functools.cached_property
    def limits(self) -> server_pb2.Limits:
        """The server's limits, asked for once."""
        return self.capabilities().limits

    @property
    def methods(self) -> dict[str, Method]:
        """The methods that the server ships, by name."""
        return {method.name: method for method in self.capabilities().methods}

    def check_spec(self, spec: context_pb2.ContextSpec) -> server_pb2.CheckSpecResponse:
        """Every reason why a context of this spec would be refused; none when it would be made."""
        request = server_pb2.CheckSpecRequest(spec=spec)
        return self.unary(self.server_stub.CheckSpec, request)

    # ---- Contexts -------------------------------------------------------------------------------

    def make_spec(
        self,
        num_layers: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        kv_dtype: str = "bf16",
        methods: typing.Sequence[str | Method] = (),
        default_method: str | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        sink_logits: typing.Sequence[float] | None = None,
        layout: str = "block_cyclic",
        stripe_tokens: int = 0,
        max_tokens: int = 0,
        ttl: float | datetime.timedelta | None = None,
        labels: typing.Mapping[str, str] | None = None,
        model_fingerprint: str = "",
    ) -> context_pb2.ContextSpec:
        """The spec of a context, as create_context and check_spec take it."""
        if layout not in _LAYOUTS:
            raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(_LAYOUTS)}")
        spec = context_pb2.ContextSpec(
            model_fingerprint=model_fingerprint,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            key_head_dim=head_dim,
            value_head_dim=value_head_dim or 0,
            kv_dtype=tensors.data_type(kv_dtype),
            scale=scale or 0.0,
            logit_soft_cap=soft_cap or 0.0,
            sink_logits=[] if sink_logits is None else sink_logits,
            methods=self._resolve(methods),
            default_method=default_method or "",
            layout=context_pb2.Layout(kind=_LAYOUTS[layout], stripe_tokens=stripe_tokens),
            max_tokens=max_tokens,
            labels=labels or {},
        )
        if ttl is not None:
            lease = ttl if isinstance(ttl, datetime.timedelta) else datetime.timedelta(seconds=ttl)
            spec.ttl.FromTimedelta(lease)
        return spec

    def _resolve(self, methods) -> list[Method]:
        """Messages as they are; names by what the server ships."""
        shipped: dict[str, Method] | None = None
        resolved = []
        for method in methods:
            if isinstance(method, Method):
                resolved.append(method)
                continue
            if shipped is None:
                shipped = self.methods
            if method not in shipped:
                known = ", ".join(sorted(shipped)) or "none"
                raise ValueError(f"the server ships no method {method!r}; it ships {known}")
            resolved.append(shipped[method])
        return resolved

    def create_context(self, *, context_id: str | None = None, **spec) -> Context:
        """Makes a context; the keywords are those of make_spec. With a context_id the call can be
        repeated: an equal spec finds the existing context."""
        return self.create_context_of(self.make_spec(**spec), context_id)

    def create_context_of(
        self, spec: context_pb2.ContextSpec, context_id: str | None = None
    ) -> Context:
        """Makes a context of a spec message."""
        request = context_pb2.CreateContextRequest(
            context_id=context_id or "", request_id=self.request_id(), spec=spec
        )
        response = self.unary(self.context_stub.CreateContext, request)
        return Context(self, response.context.context_id)

    def context(self, context_id: str) -> Context:
        """A handle on a context that exists already; asks the server nothing."""
        return Context(self, context_id)

    def contexts(self, page_size: int = 0) -> typing.Iterator[context_pb2.Context]:
        """What the server holds, page after page."""
        request = context_pb2.ListContextsRequest(page_size=page_size)
        while True:
            response = self.unary(self.context_stub.ListContexts, request)
            yield from response.contexts
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    # ---- Batched attention ----------------------------------------------------------------------

    def decode(
        self, items: typing.Sequence[results.DecodeItem], return_errors: bool = False
    ) -> list[results.AttentionResult | Error]:
        """Any number of contexts, one layer each. Items succeed or fail on their own; those that
        the server refuses for a while are repeated. The first failure is raised at the end, or with
        return_errors stands in its item's place."""
        messages = [results.decode_item(item) for item in items]
        answers: list[results.AttentionResult | Error | None] = [None] * len(items)

        def attempt(timeout):
            open_items = [
                index
                for index, answer in enumerate(answers)
                if answer is None or (isinstance(answer, Error) and answer.retryable)
            ]
            request = attention_pb2.DecodeRequest(items=[messages[index] for index in open_items])
            response = self.attention_stub.Decode(request, timeout=timeout)
            queries = [items[index].query for index in open_items]
            refused = None
            for index, answer in zip(
                open_items, streams.decode_answers(response.results, queries), strict=True
            ):
                answers[index] = answer
                if isinstance(answer, Error) and answer.retryable:
                    refused = refused or answer
            if refused is not None:
                raise refused

        try:
            self.retries.call(attempt)
        except Error:
            # A whole call that failed leaves items without an answer; a refused item has its own.
            if any(answer is None for answer in answers):
                raise
        if not return_errors:
            streams.raise_first(answers)
        return typing.cast(list, answers)

    def decode_stream(
        self, contexts: typing.Sequence[Context], window: int = 0, timeout: float | None = None
    ) -> streams.DecodeStream:
        """A session over these contexts; `window` steps may be in flight, 0 for the server's
        limit. Lower latency than decode, and steps can be pipelined."""
        return streams.DecodeStream(
            self.attention_stub.DecodeStream, timeout, [context.id for context in contexts], window
        )
