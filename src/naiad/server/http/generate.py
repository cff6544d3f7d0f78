"""Triton's generate extension: any JSON object in, tensors by name, one reply or an event stream."""

from __future__ import annotations

from typing import Any

import msgspec

from naiad.core.errors import InvalidRequest, Unsupported
from naiad.core.model import InferRequest, InferResponse, ModelMetadata, Parameter, TensorSpec
from naiad.core.tensor import DataType, Tensor
from naiad.server.admission import Admission
from naiad.server.http.exchange import Exchange, Send
from naiad.server.http.infer import check_parameters, note_usage
from naiad.server.http.intake import Intake, decode_apart
from naiad.server.http.tensors import tensor_from_json, tensor_to_json
from naiad.server.models import ModelTable, ServedModel

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder(order="sorted").encode


class GenerateRoutes:
    """`generate` and `generate_stream`, for every model.

    Args:
        table: The models.
        admission: Who may run.
        intake: Reads the bodies.
    """

    def __init__(self, table: ModelTable, admission: Admission, intake: Intake) -> None:
        self._table = table
        self._admission = admission
        self._intake = intake

    async def answer(self, exchange: Exchange, model: str, version: str, *, stream: bool) -> None:
        """Decode, infer, encode: one response, or all of them as events."""
        data = await self._intake.read(exchange)
        served = self._table.find(model, version)
        request = await decode_apart(
            data,
            lambda data: decode_generate(data, served.metadata, model, version or served.version),
        )
        async with self._admission.admit(exchange.disconnected):
            if stream:
                await _stream(exchange, served, request)
            else:
                await _whole(exchange, served, request)


async def _whole(exchange: Exchange, served: ServedModel, request: InferRequest) -> None:
    responses = served.infer(request)
    try:
        response = await anext(responses, None)
        if response is None or await anext(responses, None) is not None:
            raise Unsupported(
                "generate expects model to produce exactly 1 response, use generate stream for "
                "model that generates various number of responses"
            )
        note_usage(exchange, response)
        await exchange.reply(200, _encode(encode_generate(response)))
    finally:
        await responses.aclose()


async def _stream(exchange: Exchange, served: ServedModel, request: InferRequest) -> None:
    responses = served.infer(request)
    send: Send | None = None
    try:
        async for response in responses:
            event = b"data: " + _encode(encode_generate(response)) + b"\n\n"
            if send is None:
                send = await exchange.start_stream()
            exchange.num_reply_bytes += len(event)
            note_usage(exchange, response)
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if send is None:
            await exchange.start_stream()
        await exchange.end_stream()
    finally:
        await responses.aclose()


def decode_generate(data: bytes, metadata: ModelMetadata, model: str, version: str) -> InferRequest:
    """A JSON object as a request: keys that name inputs are tensors, the others parameters.

    Raises:
        InvalidRequest: not an object, or a value that no tensor of that input can hold.
    """
    try:
        body = _decode(data)
    except RecursionError:
        raise InvalidRequest("JSON nesting depth exceeds maximum allowed limit (100)") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"failed to parse the request JSON buffer: {error}") from None
    nested = body.pop("parameters", None)
    if isinstance(nested, dict):
        if twice := body.keys() & nested.keys():
            raise InvalidRequest(f"'{min(twice)}' is given twice, also in parameters")
        body.update(nested)
    elif nested is not None:
        raise InvalidRequest("'parameters' must be an object")
    identity = body.pop("id", "")
    specs = {spec.name: spec for spec in metadata.inputs}
    tensors: list[Tensor] = []
    parameters: dict[str, Parameter] = {}
    for name, value in body.items():
        spec = specs.get(name)
        if value is None:
            continue
        if spec is None or (isinstance(value, str) and spec.datatype is not DataType.BYTES):
            # The vLLM backend's clients send numbers as strings too; the model converts those.
            parameters.update(check_parameters({name: value}))
        else:
            tensors.append(_tensor(spec, value))
    return InferRequest(
        model_name=model,
        model_version=version,
        id=identity if isinstance(identity, str) else str(identity)[:128],
        inputs=tuple(tensors),
        parameters=parameters,
    )


def _tensor(spec: TensorSpec, value: Any) -> Tensor:
    data = value if isinstance(value, list) else [value]
    return tensor_from_json(spec.name, spec.datatype, _shape(spec, len(data)), data)


def _shape(spec: TensorSpec, count: int) -> tuple[int, ...]:
    """The innermost -1 takes what the fixed dimensions leave; every other -1 is 1."""
    shape = [max(size, 1) if size < 0 else size for size in spec.shape]
    fixed = 1
    for size in shape:
        fixed *= size
    open_dims = [at for at, size in enumerate(spec.shape) if size < 0]
    if open_dims and fixed and count % fixed == 0:
        shape[open_dims[-1]] = count // fixed
    elif fixed != count:
        raise InvalidRequest(
            f"The schema can not convert input '{spec.name}' to tensor with proper shape: "
            f"{count} values for {list(spec.shape)}"
        )
    return tuple(shape)


def encode_generate(response: InferResponse) -> dict[str, Any]:
    """The reply object; an output with one element is that element."""
    reply: dict[str, Any] = {"id": response.id} if response.id else {}
    reply["model_name"] = response.model_name
    reply["model_version"] = response.model_version
    reply.update(response.parameters)
    for tensor in response.outputs:
        values = tensor_to_json(tensor)["data"]
        reply[tensor.name] = values[0] if len(values) == 1 else values
    return reply
