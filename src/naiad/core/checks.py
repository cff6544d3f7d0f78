"""Does a request fit what a model says of itself? Models whose inputs are all required ask first.

Text models read their many optional inputs themselves (`core.text_tensors`).

The messages have the shape that Triton's clients and tests look for. Values are not looked at, only
names, datatypes and shapes; sizes were checked when the tensor was decoded.
"""

from __future__ import annotations

from naiad.core.errors import InvalidRequest
from naiad.core.model import InferRequest, ModelMetadata, TensorSpec
from naiad.core.tensor import Tensor


def check_request(request: InferRequest, metadata: ModelMetadata) -> None:
    """Raise `InvalidRequest` unless inputs and requested outputs fit `metadata`."""
    specs = {spec.name: spec for spec in metadata.inputs}
    try:
        for tensor in request.inputs:
            if tensor.name not in specs:
                raise InvalidRequest(
                    f"unexpected inference input '{tensor.name}', allowed inputs are: "
                    f"{', '.join(specs)}"
                )
        _check_names(request, metadata)
        for tensor in request.inputs:
            _check_tensor(tensor, specs[tensor.name], metadata.name)
        known = {spec.name for spec in metadata.outputs}
        for output in request.outputs:
            if output.name not in known:
                raise InvalidRequest(
                    f"unexpected inference output '{output.name}' for model '{metadata.name}'"
                )
    except InvalidRequest as error:
        identity = request.id or "<id_unknown>"
        raise InvalidRequest(f"[request id: {identity}] {error}", hint=error.hint) from None


def _check_names(request: InferRequest, metadata: ModelMetadata) -> None:
    got = [tensor.name for tensor in request.inputs]
    required = [spec.name for spec in metadata.inputs if not spec.optional]
    missing = [name for name in required if name not in got]
    most = len(metadata.inputs)
    if missing or len(got) > most:
        if len(required) == most:
            expected = f"expected {most} inputs but got {len(got)} inputs"
        else:
            expected = (
                f"expected number of inputs between {len(required)} and {most} but got {len(got)}"
            )
        tail = f", but missing required input(s) {_names(missing)}" if missing else ""
        raise InvalidRequest(
            f"{expected} for model '{metadata.name}'. Got input(s) {_names(got)}{tail}"
        )
    if len(set(got)) != len(got):
        repeated = next(name for name in got if got.count(name) > 1)
        raise InvalidRequest(f"input '{repeated}' is given more than once")


def _check_tensor(tensor: Tensor, spec: TensorSpec, model: str) -> None:
    if tensor.datatype is not spec.datatype:
        raise InvalidRequest(
            f"inference input '{tensor.name}' data-type is '{tensor.datatype.value}', but model "
            f"'{model}' expects '{spec.datatype.value}'"
        )
    fits = len(tensor.shape) == len(spec.shape) and all(
        want in (-1, got) for want, got in zip(spec.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise InvalidRequest(
            f"unexpected shape for input '{tensor.name}' for model '{model}'. "
            f"Expected {_dims(spec.shape)}, got {_dims(tensor.shape)}"
        )


def _names(names: list[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"


def _dims(shape: tuple[int, ...]) -> str:
    return "[" + ",".join(str(size) for size in shape) + "]"
