"""Tensors as the `data` of a JSON body, both ways.

Values are checked as strictly as the datatype wants: a JSON string is no number and 1.5 no integer.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from naiad.core.errors import InvalidRequest
from naiad.core.tensor import DataType, Tensor

MAX_DEPTH = 100
MAX_DIMS = 32
MAX_ELEMENTS = 2**40

_FLOATS = {DataType.FP32, DataType.FP64}
_NOT_IN_JSON = {DataType.FP16, DataType.BF16}


def tensor_from_json(name: str, datatype: DataType, shape: tuple[int, ...], data: Any) -> Tensor:
    """A tensor from `data`, flat or nested in any way with the right number of elements.

    Raises:
        InvalidRequest: a wrong count, a value that is not of `datatype`, or a 16-bit float type.
    """
    if datatype in _NOT_IN_JSON:
        raise InvalidRequest(
            f"input '{name}': {datatype.value} cannot be sent as JSON",
            hint="use the binary tensor data extension, or FP32",
        )
    # numpy overflows on what an empty tensor would span, too
    spans = math.prod(max(size, 1) for size in shape)
    if len(shape) > MAX_DIMS or spans > MAX_ELEMENTS or any(size < 0 for size in shape):
        raise InvalidRequest(f"input '{name}': shape {list(shape)} is not valid")
    flat = _flatten(name, data)
    expected = math.prod(shape)
    if len(flat) != expected:
        raise InvalidRequest(
            f"input '{name}' has {len(flat)} values, its shape {list(shape)} needs {expected}"
        )
    return Tensor(name, datatype, shape, _array(name, datatype, flat).reshape(shape))


def _flatten(name: str, data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise InvalidRequest(f"input '{name}': data must be an array")
    depth = 1
    while any(type(item) is list for item in data):
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"JSON nesting depth exceeds maximum allowed limit ({MAX_DEPTH})")
        flat: list[Any] = []
        for item in data:
            if type(item) is list:
                flat += item
            else:
                flat.append(item)
        data = flat
    found: list[Any] = data
    return found


def _array(name: str, datatype: DataType, flat: list[Any]) -> npt.NDArray[np.generic]:
    try:
        if datatype is DataType.BYTES:
            array = np.empty(len(flat), np.object_)
            array[:] = [text.encode() for text in msgspec.convert(flat, list[str])]
            return array
        if datatype is DataType.BOOL:
            return np.array(msgspec.convert(flat, list[bool]), np.bool_)
        if datatype in _FLOATS:
            with np.errstate(over="ignore"):  # past the range of FP32 is infinity
                return np.array(msgspec.convert(flat, list[float]), datatype.numpy)
        return np.array(msgspec.convert(flat, list[int]), datatype.numpy)
    except (msgspec.ValidationError, OverflowError, UnicodeEncodeError) as error:
        raise InvalidRequest(f"input '{name}': a value is not {datatype.value}: {error}") from None


def tensor_to_json(tensor: Tensor) -> dict[str, Any]:
    """A response's output with its `data` flat.

    Raises:
        InvalidRequest: a 16-bit float type, or bytes that are not UTF-8; JSON holds neither.
    """
    if tensor.datatype in _NOT_IN_JSON:
        raise InvalidRequest(
            f"output '{tensor.name}': {tensor.datatype.value} cannot be returned as JSON",
            hint="use the binary tensor data extension",
        )
    values = tensor.data.ravel().tolist()
    if tensor.datatype is DataType.BYTES:
        try:
            values = [item.decode() if isinstance(item, bytes) else str(item) for item in values]
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"output '{tensor.name}' has bytes that are not UTF-8",
                hint="use the binary tensor data extension",
            ) from None
    return {
        "name": tensor.name,
        "datatype": tensor.datatype.value,
        "shape": tensor.shape,
        "data": values,
    }
