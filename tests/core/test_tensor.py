"""Datatypes of the wire protocol and their numpy equivalents."""

from __future__ import annotations

import numpy as np
import pytest

from naiad.core.errors import InvalidRequest
from naiad.core.tensor import DataType, Tensor


@pytest.mark.parametrize("datatype", [d for d in DataType if d is not DataType.BF16])
def test_a_datatype_is_found_again_from_its_array(datatype: DataType) -> None:
    assert DataType.of(np.zeros(1, datatype.numpy)) is datatype


def test_uint16_is_not_taken_for_bf16() -> None:
    assert DataType.of(np.zeros(1, np.uint16)) is DataType.UINT16
    assert DataType.BF16.numpy.itemsize == 2


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([b"a"]), np.array([b"a"], object)])
def test_strings_and_bytes_are_bytes(array: np.ndarray) -> None:
    assert DataType.of(array) is DataType.BYTES


def test_a_type_without_a_wire_name_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="complex64 has no wire datatype") as caught:
        DataType.of(np.zeros(1, np.complex64))
    assert "float32" in caught.value.hint


def test_a_tensor_takes_shape_and_type_from_its_array() -> None:
    data = np.zeros((2, 3), np.float32)
    tensor = Tensor.of("x", data)
    assert (tensor.name, tensor.datatype, tensor.shape) == ("x", DataType.FP32, (2, 3))
    assert tensor.data is data
