"""The one way into any model: `Model.infer`, an async iterator of responses.

HTTP, gRPC, the OpenAI routes, ensembles and warm-up all enter here. A plain model yields once, a
decoupled one any number of times. Cancellation is the iterator being closed. This module defines
the records and the contract; it runs nothing.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from naiad.core.tensor import DataType, Tensor

Parameter = str | int | float | bool
"""A custom request or response parameter, as the wire protocols allow them."""


class RequestedOutput(msgspec.Struct, frozen=True):
    """One output the caller asked for, with its per-output parameters."""

    name: str
    parameters: dict[str, Parameter] = {}


class InferRequest(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Tensors for one model. `outputs` empty means all of them."""

    model_name: str
    model_version: str = ""
    """Empty: the latest ready version."""
    id: str = ""
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[RequestedOutput, ...] = ()
    parameters: dict[str, Parameter] = {}


class InferUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What one request took, as its model measured it; statistics and the access log read it."""

    queue_ns: int = 0
    """Arrival to first scheduled."""
    compute_input_ns: int = 0
    compute_infer_ns: int = 0
    compute_output_ns: int = 0
    num_input_tokens: int = 0
    num_output_tokens: int = 0


class InferResponse(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One answer; a decoupled model sends several for one request."""

    model_name: str
    model_version: str
    id: str = ""
    outputs: tuple[Tensor, ...] = ()
    parameters: dict[str, Parameter] = {}
    usage: InferUsage | None = None
    """On a request's last response, from a model that knows; never sent to the client."""


class TensorSpec(msgspec.Struct, frozen=True):
    """Name, datatype and shape of a model's input or output; -1 is a dimension of any size."""

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    optional: bool = False


class ModelMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """What a model says of itself."""

    name: str
    versions: tuple[str, ...] = ("1",)
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    decoupled: bool = False
    """True: one request may get any number of responses."""
    aliases: tuple[str, ...] = ()
    """Other names the model answers to."""


class Model(abc.ABC):
    """A loaded model."""

    @property
    @abc.abstractmethod
    def metadata(self) -> ModelMetadata:
        """Constant for the model's life."""

    @abc.abstractmethod
    def infer(self, request: InferRequest) -> AsyncIterator[InferResponse]:
        """Answer `request`: one response, or several from a decoupled model.

        Closing the iterator cancels the request and frees what it held.

        Raises:
            InvalidRequest: inputs that do not fit the metadata.
            QueueFull: the model's queue is at its bound.
            Unavailable: the model cannot serve now.
        """

    def is_ready(self) -> bool:
        """Whether a request sent now would be served. Cheap: health checks call it."""
        return True

    async def close(self) -> None:
        """Release everything. Requests still running end with `Unavailable`."""
        return

    def extra_metrics(self) -> list[Any]:
        """Metric families of this model beside the ones every model has (`core.metrics`)."""
        return []
