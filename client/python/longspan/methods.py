"""Sparse attention methods as messages: read from the text format of deploy/methods."""

from __future__ import annotations

import os
import pathlib

from google.protobuf import text_format

from longspan.v1.method_pb2 import Method


def parse_method(text: str) -> Method:
    """A Method from protobuf text. ValueError says where the text is wrong."""
    try:
        return text_format.Parse(text, Method())
    except text_format.ParseError as failure:
        raise ValueError(f"not a method: {failure}") from None


def load_method(path: str | os.PathLike) -> Method:
    """A Method from a .txtpb file; one without a name takes the file's."""
    path = pathlib.Path(path)
    try:
        method = parse_method(path.read_text(encoding="utf-8"))
    except ValueError as failure:
        raise ValueError(f"{path}: {failure}") from None
    if not method.name:
        method.name = path.stem
    return method
