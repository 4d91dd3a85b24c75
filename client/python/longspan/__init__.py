"""Client of Longspan: attention over million-token contexts, as a service."""

from longspan.client import Client
from longspan.context import Context
from longspan.errors import Error, FieldViolation
from longspan.methods import Method, load_method, parse_method
from longspan.results import (
    AttentionResult,
    DecodeItem,
    Explanation,
    RowSelection,
    SelectedSpan,
)
from longspan.streams import AppendStream, DecodeStream, PrefillStream
from longspan.version import __version__

__all__ = [
    "AppendStream",
    "AttentionResult",
    "Client",
    "Context",
    "DecodeItem",
    "DecodeStream",
    "Error",
    "Explanation",
    "FieldViolation",
    "Method",
    "PrefillStream",
    "RowSelection",
    "SelectedSpan",
    "__version__",
    "load_method",
    "parse_method",
]
