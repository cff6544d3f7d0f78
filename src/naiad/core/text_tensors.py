"""A language model as tensors: the text models of Triton's vLLM and TensorRT-LLM backends.

One set of inputs serves clients of both: `sampling_parameters` (JSON) or request parameters as the
vLLM backend takes them, and one tensor per option as the TensorRT-LLM ensemble does. Options that
Naiad does not do are refused (`core.refusals`). Everything here is on top of `generate`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from naiad.core.errors import InvalidRequest, Unsupported
from naiad.core.generation import (
    MAX_PRIORITY,
    FinishReason,
    GenerateDelta,
    GenerateRequest,
    Generates,
    GenerateTiming,
    PositionLogprobs,
    SamplingParams,
    TextPrompt,
)
from naiad.core.model import InferRequest, InferResponse, InferUsage
from naiad.core.refusals import REFUSED_SAMPLING, refuse
from naiad.core.tensor import DataType, Tensor
from naiad.core.text_fields import (
    LISTS,
    NEED_LOGPROBS,
    OUTPUTS,
    REFUSED,
    RESERVED,
    SAME_NAME,
    SCALARS,
    SWITCHES,
    TRANSPORT,
    WITHOUT_OUTPUT,
)

DEFAULT_MAX_TOKENS = 16
"""What the vLLM backend generates when nobody says."""


async def infer_text(model: Generates, request: InferRequest) -> AsyncIterator[InferResponse]:
    """Continue `text_input`: one response, or with `stream` one for every piece of text.

    With several answers (`n`, `num_return_sequences`) every output has one element per answer;
    in a stream, the text of an answer that did not move is empty.

    Raises:
        InvalidRequest: an unknown input, output or parameter, or a value out of range.
        Unsupported: an option that `core.refusals` or `core.text_fields` names.
        QueueFull, Unavailable: as `generate` does.
    """
    asked = _read(request)
    progress = _Progress(model, request, asked)
    deltas = model.generate(
        GenerateRequest(
            id=request.id,
            prompt=TextPrompt(asked.text),
            sampling=asked.sampling,
            priority=asked.priority,
        )
    )
    try:
        async for delta in deltas:
            progress.add(delta)
            if asked.stream and (delta.text or delta.logprobs or delta.finish_reason):
                yield progress.take()
        if not asked.stream:
            yield progress.take()
    finally:
        close = getattr(deltas, "aclose", None)
        if close is not None:
            await close()


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request, understood."""

    text: str
    stream: bool
    prefix: str
    """Put before every answer."""
    outputs: tuple[str, ...]
    sampling: SamplingParams
    priority: int


def _read(request: InferRequest) -> _Asked:
    values, sampling = _collect(request)
    refuse(values, REFUSED)
    text = _convert(values, "text_input", str, "")
    stream = _convert(values, "stream", bool, False)
    exclude = _convert(values, "exclude_input_in_output", bool, stream)
    if stream and not exclude:
        raise InvalidRequest(
            "a stream never repeats its input", hint="leave out exclude_input_in_output"
        )
    outputs = ["text_output"]
    for switch, names in SWITCHES.items():
        if _convert(values, switch, bool, False):
            outputs += names
    if request.outputs:
        outputs = [output.name for output in request.outputs]
        if unknown := [name for name in outputs if name not in OUTPUTS]:
            raise InvalidRequest(
                f"unexpected inference output '{unknown[0]}' for model '{request.model_name}'",
                hint=f"the model has {', '.join(OUTPUTS)}",
            )
    if NEED_LOGPROBS.intersection(outputs):
        sampling.setdefault("logprobs", 0)
    return _Asked(
        text=text,
        stream=stream,
        prefix="" if exclude else text,
        outputs=tuple(outputs),
        sampling=_sampling(sampling),
        priority=_priority(values),
    )


def _priority(values: dict[str, Any]) -> int:
    """Triton's: 1 is the most urgent, 0 and what is beyond the last level the default."""
    priority: int = _convert(values, "priority", Annotated[int, Meta(ge=0)], 0)
    return priority - MAX_PRIORITY - 1 if 1 <= priority <= MAX_PRIORITY else 0


def _collect(request: InferRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values by input name, and sampling options by SamplingParams' names."""
    values: dict[str, Any] = {}
    for tensor in request.inputs:
        if tensor.name in values:
            raise InvalidRequest(f"input '{tensor.name}' is given more than once")
        values[tensor.name] = _value(tensor)
    if "text_input" not in values:
        raise InvalidRequest("input 'text_input' is missing", hint="send the prompt as text_input")
    sampling: dict[str, Any] = {}
    for name, value in request.parameters.items():
        if name in TRANSPORT:
            continue
        target = values if name in SCALARS or name in LISTS or name in RESERVED else sampling
        if name in target:
            raise InvalidRequest(f"`{name}` is given as an input and as a parameter")
        target[name] = value
    for name, value in _decode_sampling(values.get("sampling_parameters")).items():
        _put(sampling, name, value)
    for name in SAME_NAME:
        if name in values:
            _put(sampling, name, values[name])
    _add_tensorrt_names(values, sampling)
    return values, sampling


def _add_tensorrt_names(values: dict[str, Any], sampling: dict[str, Any]) -> None:
    """The options that the TensorRT-LLM ensemble names or means differently."""
    if "num_return_sequences" in values:
        _put(sampling, "n", values["num_return_sequences"])
    if "top_p" in values:
        _put(sampling, "top_p", values["top_p"] or 1.0)  # there 0 means off
    if "stop_words" in values:
        _put(sampling, "stop", values["stop_words"])
    if "end_id" in values:
        end_id = _convert(values, "end_id", int, 0)
        if end_id < 0:
            _put(sampling, "ignore_eos", True)
        else:
            _put(sampling, "stop_token_ids", [end_id])
    for name in ("pad_id", "length_penalty"):  # rows are not padded, and there are no beams
        _convert(values, name, float, 0.0)


def _value(tensor: Tensor) -> Any:
    """The plain value of an input of the expected datatype: a scalar, or a list for list inputs."""
    is_list = tensor.name in LISTS
    datatype = LISTS.get(tensor.name) or SCALARS.get(tensor.name)
    if datatype is None:
        raise InvalidRequest(
            f"unexpected inference input '{tensor.name}', allowed inputs are: "
            f"{', '.join((*SCALARS, *LISTS))}"
        )
    if tensor.datatype is not datatype:
        raise InvalidRequest(
            f"inference input '{tensor.name}' data-type is '{tensor.datatype.value}', but a text "
            f"model expects '{datatype.value}'"
        )
    items = tensor.data.ravel().tolist()
    if datatype is DataType.BYTES:
        items = [_text(tensor.name, item) for item in items]
    if is_list:
        return items
    if len(items) != 1:
        raise InvalidRequest(
            f"input '{tensor.name}' has {len(items)} elements, a text model takes exactly 1",
            hint="send one request per prompt",
        )
    return items[0]


def _text(name: str, item: bytes) -> str:
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"input '{name}' is not UTF-8: {error}") from None


def _decode_sampling(text: Any) -> dict[str, Any]:
    if not text:
        return {}
    try:
        options = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"sampling_parameters is not a JSON object: {error}") from None
    return {name: value for name, value in options.items() if value is not None}


def _put(sampling: dict[str, Any], name: str, value: Any) -> None:
    if name in sampling:
        raise InvalidRequest(f"`{name}` is given twice, as an input and as a sampling parameter")
    sampling[name] = value


def _sampling(options: dict[str, Any]) -> SamplingParams:
    best_of = options.pop("best_of", None)
    if best_of is not None and str(best_of) not in ("1", str(options.get("n", 1))):
        raise Unsupported(f"`best_of` {best_of} is not supported: every answer is returned; use n")
    refuse(options, REFUSED_SAMPLING)
    refuse(options, WITHOUT_OUTPUT)
    known = {name: value for name, value in options.items() if name not in REFUSED_SAMPLING}
    stop = known.get("stop")
    if isinstance(stop, str):
        known["stop"] = [stop] if stop else []
    elif isinstance(stop, list):
        known["stop"] = [word for word in stop if word != ""]
    known.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    try:
        return msgspec.convert(known, SamplingParams, strict=False)
    except (msgspec.ValidationError, OverflowError) as error:
        raise InvalidRequest(f"sampling parameters: {error}") from None


def _convert(values: dict[str, Any], name: str, kind: Any, default: Any) -> Any:
    if name not in values:
        return default
    try:
        return msgspec.convert(values[name], kind, strict=False)
    except (msgspec.ValidationError, OverflowError) as error:
        raise InvalidRequest(f"`{name}`: {error}") from None


class _Piece:
    """What one answer has said since the last response, and its sums so far."""

    def __init__(self) -> None:
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.clear()

    def clear(self) -> None:
        self.texts: list[str] = []
        self.num_tokens = 0
        self.logprobs: list[PositionLogprobs] = []


class _Progress:
    """Collects deltas and makes responses of them."""

    def __init__(self, model: Generates, request: InferRequest, asked: _Asked) -> None:
        metadata = model.metadata
        self._model_name = request.model_name or metadata.name
        self._model_version = request.model_version or metadata.versions[-1]
        self._id = request.id
        self._asked = asked
        self._pieces = [_Piece() for _ in range(asked.sampling.n)]
        self._num_input_tokens = 0
        self._num_output_tokens = 0
        self._timing = GenerateTiming(
            arrival_ns=0, first_scheduled_ns=0, first_token_ns=0, last_token_ns=0
        )

    def add(self, delta: GenerateDelta) -> None:
        """Take in one delta."""
        piece = self._pieces[delta.index]
        piece.texts.append(delta.text)
        piece.num_tokens += len(delta.token_ids)
        piece.logprobs += delta.logprobs
        piece.cumulative_logprob += sum(position.chosen.logprob for position in delta.logprobs)
        piece.finish_reason = delta.finish_reason
        self._num_output_tokens += len(delta.token_ids)
        if delta.prompt is not None:
            self._num_input_tokens = delta.prompt.num_tokens
        if delta.timing is not None:
            self._timing = delta.timing

    def take(self) -> InferResponse:
        """A response with everything since the last one."""
        outputs = tuple(
            Tensor.of(name, data)
            for name in self._asked.outputs
            if (data := self._output(name)) is not None
        )
        for piece in self._pieces:
            piece.clear()
        finished = all(piece.finish_reason for piece in self._pieces)
        return InferResponse(
            model_name=self._model_name,
            model_version=self._model_version,
            id=self._id,
            outputs=outputs,
            usage=self._usage() if finished else None,
        )

    def _usage(self) -> InferUsage:
        timing = self._timing
        return InferUsage(
            queue_ns=timing.first_scheduled_ns - timing.arrival_ns,
            compute_infer_ns=timing.last_token_ns - timing.first_scheduled_ns,
            num_input_tokens=self._num_input_tokens,
            num_output_tokens=self._num_output_tokens,
        )

    def _output(self, name: str) -> npt.NDArray[np.generic] | None:
        pieces = self._pieces
        match name:
            case "text_output":
                return _strings([self._asked.prefix + "".join(piece.texts) for piece in pieces])
            case "finish_reason":  # the vLLM backend writes None so, until an answer has ended
                return _strings([str(piece.finish_reason) for piece in pieces])
            case "cumulative_logprob" | "cum_log_probs":
                return np.array([piece.cumulative_logprob for piece in pieces], np.float32)
            case "logprobs":
                return _strings([_logprobs_json(piece.logprobs) for piece in pieces])
            case "output_log_probs":
                width = max(len(piece.logprobs) for piece in pieces)
                rows = np.zeros((len(pieces), width), np.float32)
                for row, piece in zip(rows, pieces, strict=True):
                    row[: len(piece.logprobs)] = [p.chosen.logprob for p in piece.logprobs]
                return rows
            case "num_input_tokens":
                return np.array([self._num_input_tokens], np.uint32)
            case "num_output_tokens":
                return np.array([piece.num_tokens for piece in pieces], np.uint32)
        if not self._timing.last_token_ns:  # the stamps come with the last token
            return None
        return np.array([getattr(self._timing, name.replace("_time_ns", "_ns"))], np.int64)


def _strings(texts: list[str]) -> npt.NDArray[np.generic]:
    array = np.empty(len(texts), np.object_)
    array[:] = [text.encode() for text in texts]
    return array


def _logprobs_json(positions: list[PositionLogprobs]) -> str:
    """A list of `{token_id: {logprob, rank, decoded_token}}`, as the vLLM backend sends them."""
    listed = [
        {
            str(token.token_id): {
                "logprob": token.logprob,
                "rank": token.rank,
                "decoded_token": token.token,
            }
            for token in (position.chosen, *position.top)
        }
        for position in positions
    ]
    return msgspec.json.encode(listed).decode()
