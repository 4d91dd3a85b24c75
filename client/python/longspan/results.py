"""What calls take and return, free of protobuf."""

from __future__ import annotations

import dataclasses
import typing

from longspan import tensors
from longspan.v1 import attention_pb2, introspect_pb2
from longspan.v1.method_pb2 import Method

if typing.TYPE_CHECKING:
    from longspan.context import Context


class SelectedSpan(typing.NamedTuple):
    """Tokens [begin, end) on a rank. score: None for forced and static spans. mass: share of the
    dense attention mass, only from explain with compare_with_dense."""

    rank: int
    begin: int
    end: int
    score: float | None
    mass: float | None


class RowSelection(typing.NamedTuple):
    """What the query at `position` attended to in one head and branch."""

    position: int
    query_head: int
    branch: int
    spans: list[SelectedSpan]
    num_tokens: int


@dataclasses.dataclass
class AttentionResult:
    """output [tokens, query_heads, value_head_dim] in the query's type; lse [tokens, query_heads]
    fp32 natural log, None unless asked for; length: tokens that the layer holds now."""

    output: typing.Any
    lse: typing.Any
    selections: list[RowSelection]
    length: int
    generation: int


@dataclasses.dataclass
class Explanation:
    """recall and relative_error: fp32 [tokens, query_heads], None unless compared with dense."""

    selections: list[RowSelection]
    recall: typing.Any
    relative_error: typing.Any
    read_fraction: float
    method: str


@dataclasses.dataclass
class DecodeItem:
    """One layer of one context in a batched decode; shapes as in Context.decode."""

    context: Context
    layer: int
    query: typing.Any
    key: typing.Any = None
    value: typing.Any = None
    start_pos: int | None = None
    gates: typing.Any = None
    search_query: typing.Any = None
    method: str | Method | None = None
    return_lse: bool = False
    return_selection: bool = False
    expected_generation: int = 0


def options(method, return_lse: bool, return_selection: bool) -> attention_pb2.AttentionOptions:
    """The wire's options; `method` is a name, a message or None for the context's default."""
    message = attention_pb2.AttentionOptions(
        return_lse=return_lse, return_selection=return_selection
    )
    if isinstance(method, Method):
        message.method.CopyFrom(method)
    elif method is not None:
        message.method_name = method
    return message


def decode_item(item: DecodeItem) -> attention_pb2.DecodeItem:
    """The wire's form of an item."""
    message = attention_pb2.DecodeItem(
        context_id=item.context.id,
        layer=item.layer,
        options=options(item.method, item.return_lse, item.return_selection),
        expected_generation=item.expected_generation,
    )
    if item.start_pos is not None:
        message.start_pos = item.start_pos
    set_tensors(
        message,
        tensors.all_to_wire(
            query=item.query,
            key=item.key,
            value=item.value,
            gates=item.gates,
            search_query=item.search_query,
        ),
    )
    return message


def set_tensors(message, wires: dict[str, tensors.WireArray]) -> None:
    """Fills the fields of a message that the arrays are named after."""
    for field, wire in wires.items():
        wire.fill(getattr(message, field))


def attention_result(message, query) -> AttentionResult:
    """From a PrefillResponse or DecodeResult; arrays of the query's kind."""
    return AttentionResult(
        output=tensors.from_wire(message.output, query),
        lse=tensors.from_wire(message.lse, query) if message.HasField("lse") else None,
        selections=selections(message.selections),
        length=message.layer_length,
        generation=message.generation,
    )


def selections(messages: typing.Iterable[introspect_pb2.RowSelection]) -> list[RowSelection]:
    """The wire's selections with absent values as None."""
    return [
        RowSelection(
            row.position,
            row.query_head,
            row.branch,
            [
                SelectedSpan(
                    span.rank,
                    span.begin,
                    span.end,
                    span.score if span.HasField("score") else None,
                    span.mass if span.HasField("mass") else None,
                )
                for span in row.spans
            ],
            row.num_tokens,
        )
        for row in messages
    ]


def join(parts: list[AttentionResult]) -> AttentionResult:
    """One result of the results of consecutive chunks."""
    return AttentionResult(
        output=tensors.join([part.output for part in parts]),
        lse=tensors.join([part.lse for part in parts]),
        selections=[row for part in parts for row in part.selections],
        length=parts[-1].length,
        generation=parts[-1].generation,
    )
