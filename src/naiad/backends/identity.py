"""A model that gives back what it was given: the smallest use of `core.Model` with tensors.

For tests, for measuring the server alone, and as the shortest example of a backend.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from naiad.core.checks import check_request
from naiad.core.model import InferRequest, InferResponse, Model, ModelMetadata, TensorSpec
from naiad.core.tensor import DataType


class IdentityModel(Model):
    """`INPUTi` comes back as `OUTPUTi`.

    Args:
        name: The model's name.
        datatypes: One input per datatype.
        shape: Of every input; -1 is a dimension of any size.
    """

    def __init__(
        self,
        name: str = "identity",
        datatypes: tuple[DataType, ...] = (DataType.FP32,),
        shape: tuple[int, ...] = (-1, -1),
    ) -> None:
        self._metadata = ModelMetadata(
            name=name,
            platform="identity",
            inputs=tuple(
                TensorSpec(f"INPUT{number}", datatype, shape)
                for number, datatype in enumerate(datatypes)
            ),
            outputs=tuple(
                TensorSpec(f"OUTPUT{number}", datatype, shape)
                for number, datatype in enumerate(datatypes)
            ),
        )

    @property
    def metadata(self) -> ModelMetadata:
        return self._metadata

    async def infer(self, request: InferRequest) -> AsyncIterator[InferResponse]:
        """See `Model.infer`."""
        check_request(request, self._metadata)
        outputs = {tensor.name.replace("INPUT", "OUTPUT"): tensor for tensor in request.inputs}
        wanted = [output.name for output in request.outputs] or [
            spec.name for spec in self._metadata.outputs
        ]
        yield InferResponse(
            model_name=request.model_name,
            model_version=request.model_version or self._metadata.versions[-1],
            id=request.id,
            outputs=tuple(msgspec.structs.replace(outputs[name], name=name) for name in wanted),
        )
