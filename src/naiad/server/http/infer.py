"""`POST /v2/models/{model}/infer`: the JSON form of the KServe v2 protocol.

Binary outputs are an extension that the server does not list: a request that prefers them
(`binary_data`, `binary_data_output`, which Triton's clients send unasked) gets JSON, and the client
sees so from the header that is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from naiad.core.errors import InternalError, InvalidRequest, Unsupported
from naiad.core.model import InferRequest, InferResponse, Parameter, RequestedOutput
from naiad.core.tensor import DataType, Tensor
from naiad.server.admission import Admission
from naiad.server.http.exchange import Exchange
from naiad.server.http.intake import Intake, decode_apart
from naiad.server.http.tensors import tensor_from_json, tensor_to_json
from naiad.server.models import ModelTable

_RESERVED_PREFIX = "triton_"
_NO_DATA = msgspec.UNSET


class InputBody(msgspec.Struct):
    """One input of a request."""

    name: str
    shape: tuple[int, ...]
    datatype: str
    data: Any = _NO_DATA
    parameters: dict[str, Any] = {}


class OutputBody(msgspec.Struct):
    """One output that a request asks for."""

    name: str
    parameters: dict[str, Any] = {}


class InferBody(msgspec.Struct):
    """The request; other keys beside these are ignored, as Triton ignores them."""

    inputs: list[InputBody] = []
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[OutputBody] | None = None


_decode = msgspec.json.Decoder(InferBody).decode
_encode = msgspec.json.Encoder().encode


class InferRoute:
    """The route, for every model.

    Args:
        table: The models.
        admission: Who may run.
        intake: Reads the bodies.
    """

    def __init__(self, table: ModelTable, admission: Admission, intake: Intake) -> None:
        self._table = table
        self._admission = admission
        self._intake = intake

    async def answer(self, exchange: Exchange, model: str, version: str) -> None:
        """Decode, infer, encode."""
        data = await self._intake.read(exchange)
        served = self._table.find(model, version)
        if exchange.header(b"inference-header-content-length") is not None:
            raise Unsupported(
                "the binary tensor data extension is not supported yet",
                hint="send tensors as JSON (tritonclient: binary_data=False)",
            )
        request = await decode_apart(
            data, lambda data: decode_infer(data, model, version or served.version)
        )
        async with self._admission.admit(exchange.disconnected):
            responses = served.infer(request)
            try:
                response = await anext(responses, None)
                if response is None:
                    raise InternalError(f"model '{model}' gave no response")
                if await anext(responses, None) is not None:
                    raise Unsupported(
                        "HTTP end point doesn't support models with decoupled transaction policy",
                        hint="use generate_stream",
                    )
                note_usage(exchange, response)
                await exchange.reply(200, encode_infer(response))
            finally:
                await responses.aclose()


def note_usage(exchange: Exchange, response: InferResponse) -> None:
    """Remember for the access log what a response says it took."""
    if response.usage is not None:
        exchange.num_input_tokens = response.usage.num_input_tokens
        exchange.num_output_tokens = response.usage.num_output_tokens


def decode_infer(data: bytes, model: str, version: str) -> InferRequest:
    """A JSON body as a request; raises `InvalidRequest` or `Unsupported`."""
    try:
        body = _decode(data)
    except RecursionError:
        raise InvalidRequest("JSON nesting depth exceeds maximum allowed limit (100)") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"failed to parse the request JSON buffer: {error}") from None
    _check_switch("", "binary_data_output", body.parameters)
    return InferRequest(
        model_name=model,
        model_version=version,
        id=body.id,
        inputs=tuple(_input(item) for item in body.inputs),
        outputs=tuple(_output(item) for item in body.outputs or ()),
        parameters=check_parameters(body.parameters),
    )


def check_parameters(parameters: Mapping[str, Any]) -> dict[str, Parameter]:
    """Request parameters, which are scalars and not the server's own."""
    for name, value in parameters.items():
        if name.startswith(_RESERVED_PREFIX):
            raise InvalidRequest(
                f"parameter keys starting with '{_RESERVED_PREFIX}' are reserved, got '{name}'"
            )
        if not isinstance(value, (str, int, float, bool)):
            raise InvalidRequest(f"parameter '{name}' must be a string, a number or a boolean")
    return dict(parameters)


def _input(body: InputBody) -> Tensor:
    if body.datatype not in DataType.__members__:
        raise InvalidRequest(f"input '{body.name}': unknown datatype '{body.datatype}'")
    if "shared_memory_region" in body.parameters:
        raise Unsupported(f"input '{body.name}': shared memory is not supported yet")
    if "binary_data_size" in body.parameters:
        if body.data is not _NO_DATA:
            raise InvalidRequest(
                "Input must set only one of the following fields: 'data', 'binary_data_size' in "
                "'parameters', 'shared_memory_region' in 'parameters'"
            )
        raise InvalidRequest(
            f"input '{body.name}' has binary_data_size, the request has no "
            "Inference-Header-Content-Length"
        )
    if body.data is _NO_DATA:
        raise InvalidRequest(f"input '{body.name}' has no data", hint="send it as `data`")
    return tensor_from_json(body.name, DataType[body.datatype], body.shape, body.data)


def _output(body: OutputBody) -> RequestedOutput:
    for name in ("classification", "shared_memory_region"):
        if name in body.parameters:
            raise Unsupported(f"output '{body.name}': {name} is not supported yet")
    if unknown := body.parameters.keys() - {"binary_data"}:
        raise InvalidRequest(f"output '{body.name}': unknown parameter '{min(unknown)}'")
    _check_switch(f"output '{body.name}': ", "binary_data", body.parameters)
    return RequestedOutput(body.name, check_parameters(body.parameters))


def _check_switch(where: str, name: str, parameters: Mapping[str, Any]) -> None:
    if not isinstance(parameters.get(name, False), bool):
        raise InvalidRequest(f"{where}parameter '{name}' must be true or false")


def encode_infer(response: InferResponse) -> bytes:
    """A response as JSON."""
    reply: dict[str, Any] = {"id": response.id} if response.id else {}
    reply["model_name"] = response.model_name
    reply["model_version"] = response.model_version
    if response.parameters:
        reply["parameters"] = response.parameters
    reply["outputs"] = [tensor_to_json(tensor) for tensor in response.outputs]
    return _encode(reply)
