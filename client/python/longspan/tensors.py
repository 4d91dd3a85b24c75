"""Arrays to wire tensors and back: numpy and torch; fp32, fp16 and bf16.

torch and ml_dtypes are optional and never imported before an array of theirs arrives.
"""

from __future__ import annotations

import sys
import typing

import numpy

from longspan.v1 import tensor_pb2

_NUMPY_TYPES = {
    "float32": tensor_pb2.DATA_TYPE_FP32,
    "float16": tensor_pb2.DATA_TYPE_FP16,
    "bfloat16": tensor_pb2.DATA_TYPE_BF16,
}
_NAMES = {
    "fp32": tensor_pb2.DATA_TYPE_FP32,
    "fp16": tensor_pb2.DATA_TYPE_FP16,
    "bf16": tensor_pb2.DATA_TYPE_BF16,
}


def is_torch(array) -> bool:
    """Whether `array` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def data_type(name: str) -> int:
    """The wire's element type for "fp32", "fp16" or "bf16"."""
    if name not in _NAMES:
        raise ValueError(f"kv_dtype is {name!r}; it must be one of {', '.join(_NAMES)}")
    return _NAMES[name]


class WireArray(typing.NamedTuple):
    """An array whose rows can be cut and sent. `rows` is contiguous numpy; bf16 as 16-bit words."""

    rows: numpy.ndarray
    dtype: int

    def cut(self, begin: int, end: int) -> WireArray:
        return WireArray(self.rows[begin:end], self.dtype)

    def fill(self, tensor: tensor_pb2.Tensor) -> None:
        """Sets a tensor in place: a finished one would be copied once more by each message around
        it."""
        tensor.dtype = self.dtype
        tensor.shape.extend(self.rows.shape)
        tensor.raw = self.rows.tobytes()

    @property
    def row_bytes(self) -> int:
        return int(numpy.prod(self.rows.shape[1:], dtype=numpy.int64)) * self.rows.itemsize


def to_wire(field: str, array) -> WireArray:
    """Accepts numpy arrays and torch tensors on any device; `field` is what errors name."""
    if is_torch(array):
        torch = sys.modules["torch"]
        name = str(array.dtype).removeprefix("torch.")
        array = array.detach().cpu().contiguous()
        rows = array.view(torch.int16).numpy() if name == "bfloat16" else array.numpy()
    elif isinstance(array, numpy.ndarray):
        name = array.dtype.name
        rows = numpy.ascontiguousarray(array)
    else:
        raise TypeError(f"{field} is a {type(array).__name__}; pass a numpy array or torch tensor")
    if name not in _NUMPY_TYPES:
        raise TypeError(f"{field} has type {name}; convert it to float32, float16 or bfloat16")
    if rows.ndim == 0:
        raise ValueError(f"{field} is a scalar; its first dimension must be tokens")
    return WireArray(rows, _NUMPY_TYPES[name])


def all_to_wire(**arrays) -> dict[str, WireArray]:
    """The given arrays by their fields' names, without those that are None."""
    return {field: to_wire(field, array) for field, array in arrays.items() if array is not None}


def from_wire(tensor: tensor_pb2.Tensor, like):
    """The array of `tensor`, as torch when `like` is torch (on its device), else as numpy."""
    shape = tuple(tensor.shape)
    if is_torch(like):
        torch = sys.modules["torch"]
        types = {
            tensor_pb2.DATA_TYPE_FP32: torch.float32,
            tensor_pb2.DATA_TYPE_FP16: torch.float16,
            tensor_pb2.DATA_TYPE_BF16: torch.bfloat16,
        }
        if not tensor.raw:
            return torch.empty(shape, dtype=types[tensor.dtype], device=like.device)
        # A bytearray, because torch refuses to share memory that it may not write to.
        flat = torch.frombuffer(bytearray(tensor.raw), dtype=types[tensor.dtype])
        return flat.reshape(shape).to(like.device)
    return numpy.frombuffer(tensor.raw, dtype=_numpy_type(tensor.dtype)).reshape(shape).copy()


def join(parts: list):
    """Row-wise concatenation of what from_wire returned; None when the parts are None."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    if is_torch(parts[0]):
        return sys.modules["torch"].cat(parts)
    return numpy.concatenate(parts)


def _numpy_type(dtype: int):
    if dtype == tensor_pb2.DATA_TYPE_FP32:
        return numpy.dtype(numpy.float32)
    if dtype == tensor_pb2.DATA_TYPE_FP16:
        return numpy.dtype(numpy.float16)
    import ml_dtypes

    return numpy.dtype(ml_dtypes.bfloat16)
