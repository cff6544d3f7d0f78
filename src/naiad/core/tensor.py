"""Datatypes and tensors of the KServe v2 protocol, as every protocol and backend sees them.

Owns the names and numpy equivalents of the datatypes, and the `Tensor` record. Encoding to
JSON or bytes belongs to the protocol that does it.
"""

from __future__ import annotations

import enum

import msgspec
import numpy as np
import numpy.typing as npt

from naiad.core.errors import InvalidRequest


class DataType(enum.StrEnum):
    """Element types of the wire protocol, by their wire names."""

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"
    BF16 = "BF16"

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """The numpy dtype that holds it: object (of `bytes`) for BYTES, the raw uint16 for BF16."""
        return _NUMPY[self]

    @staticmethod
    def of(array: npt.NDArray[np.generic]) -> DataType:
        """The datatype of a numpy array; object, str and bytes arrays are BYTES."""
        if array.dtype.kind in "OSU":
            return DataType.BYTES
        try:
            return _BY_NUMPY[array.dtype]
        except KeyError:
            raise InvalidRequest(
                f"numpy dtype {array.dtype} has no wire datatype",
                hint=f"convert to one of {', '.join(sorted(str(d) for d in _BY_NUMPY))}",
            ) from None


_NUMPY: dict[DataType, np.dtype[np.generic]] = {
    DataType.BOOL: np.dtype(np.bool_),
    DataType.UINT8: np.dtype(np.uint8),
    DataType.UINT16: np.dtype(np.uint16),
    DataType.UINT32: np.dtype(np.uint32),
    DataType.UINT64: np.dtype(np.uint64),
    DataType.INT8: np.dtype(np.int8),
    DataType.INT16: np.dtype(np.int16),
    DataType.INT32: np.dtype(np.int32),
    DataType.INT64: np.dtype(np.int64),
    DataType.FP16: np.dtype(np.float16),
    DataType.FP32: np.dtype(np.float32),
    DataType.FP64: np.dtype(np.float64),
    DataType.BYTES: np.dtype(np.object_),
    DataType.BF16: np.dtype(np.uint16),
}
_BY_NUMPY = {dtype: name for name, dtype in reversed(_NUMPY.items()) if name != DataType.BYTES}
_BY_NUMPY[np.dtype(np.uint16)] = DataType.UINT16  # BF16 shares its storage, not its name


class Tensor(msgspec.Struct, frozen=True, eq=False):
    """One named tensor of a request or response.

    `data` has exactly `shape` and the numpy dtype of `datatype`; for BYTES its elements are
    `bytes`. It may be a view of a request body: do not write to it.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    data: npt.NDArray[np.generic]

    @staticmethod
    def of(name: str, data: npt.NDArray[np.generic]) -> Tensor:
        """Wrap a numpy array, taking datatype and shape from it; raises `InvalidRequest`."""
        return Tensor(name, DataType.of(data), data.shape, data)
