"""`/v2/models/...`: metadata, readiness, configuration, statistics, and the way to inference.

Model names may hold slashes, quoted or not, so the path is read from its end: what is asked, then a
version, and everything before is the name.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

import msgspec

from naiad.core.errors import InvalidRequest
from naiad.core.model import ModelMetadata, TensorSpec
from naiad.server.admission import Admission
from naiad.server.http.exchange import Exchange, WrongMethod
from naiad.server.http.generate import GenerateRoutes
from naiad.server.http.infer import InferRoute
from naiad.server.http.intake import Intake
from naiad.server.models import ModelTable, UnknownModel

_PATH = re.compile(
    r"/v2/models/(?:(?P<model>.+?)(?:/versions/(?P<version>\d+))?/)??"
    r"(?P<action>infer|generate|generate_stream|ready|config|stats)"
)
_METADATA_PATH = re.compile(r"/v2/models/(?P<model>.+?)(?:/versions/(?P<version>\d+))?")
_POSTS = {"infer", "generate", "generate_stream"}


class ModelPath(msgspec.Struct, frozen=True):
    """What a path under `/v2/models/` names; `action` is empty for metadata."""

    model: str
    version: str
    action: str


def parse_path(raw_path: bytes) -> ModelPath | None:
    """Read a path; None if it names nothing."""
    path = raw_path.partition(b"?")[0].decode("ascii", "replace")
    match = _PATH.fullmatch(path) or _METADATA_PATH.fullmatch(path)
    if match is None:
        return None
    found = match.groupdict("")
    return ModelPath(unquote(found["model"]), found["version"], found.get("action", ""))


class KServeRoutes:
    """Everything under `/v2/models/`.

    Args:
        table: The models.
        admission: Who may run.
        intake: Reads the bodies.
    """

    def __init__(self, table: ModelTable, admission: Admission, intake: Intake) -> None:
        self._table = table
        self._infer = InferRoute(table, admission, intake)
        self._generate = GenerateRoutes(table, admission, intake)

    async def answer(self, exchange: Exchange) -> None:
        """Find out what is asked and answer it."""
        path = parse_path(exchange.scope["raw_path"])
        if path is None or (not path.model and path.action != "stats"):
            await exchange.reply(404, msgspec.json.encode({"error": "Not Found"}))
            return
        allowed = ("POST",) if path.action in _POSTS else ("GET", "HEAD")
        if exchange.scope["method"] not in allowed:
            raise WrongMethod("Method Not Allowed", allow=", ".join(allowed))
        exchange.model = path.model
        match path.action:
            case "infer":
                await self._infer.answer(exchange, path.model, path.version)
            case "generate" | "generate_stream":
                stream = path.action == "generate_stream"
                await self._generate.answer(exchange, path.model, path.version, stream=stream)
            case "ready":
                await self._ready(exchange, path)
            case _:
                await exchange.reply(200, msgspec.json.encode(self._page(path)))

    async def _ready(self, exchange: Exchange, path: ModelPath) -> None:
        if not self._table.find(path.model, path.version).model.is_ready():
            raise InvalidRequest("Model version not ready")
        await exchange.reply(200)

    def _page(self, path: ModelPath) -> dict[str, Any]:
        if path.action == "stats":
            return self._statistics(path)
        served = self._table.find(path.model, path.version)
        if path.action == "config":
            return config_reply(served.metadata)
        return metadata_reply(served.metadata)

    def _statistics(self, path: ModelPath) -> dict[str, Any]:
        if not path.model:
            return {"model_stats": [served.statistics.reply() for served in self._table.served]}
        try:
            served = self._table.find(path.model, path.version)
        except UnknownModel as error:
            raise UnknownModel(
                f"requested model '{path.model}' is not available", **error.facts
            ) from None
        return {"model_stats": [served.statistics.reply()]}


def metadata_reply(metadata: ModelMetadata) -> dict[str, Any]:
    """The metadata object of the protocol."""

    def of(spec: TensorSpec) -> dict[str, Any]:
        return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}

    return {
        "name": metadata.name,
        "versions": metadata.versions,
        "platform": metadata.platform,
        "inputs": [of(spec) for spec in metadata.inputs],
        "outputs": [of(spec) for spec in metadata.outputs],
    }


def config_reply(metadata: ModelMetadata) -> dict[str, Any]:
    """The part of Triton's ModelConfig that follows from the metadata."""

    def of(spec: TensorSpec) -> dict[str, Any]:
        kind = "STRING" if spec.datatype == "BYTES" else spec.datatype.value
        return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": spec.shape}

    return {
        "name": metadata.name,
        "platform": metadata.platform,
        "backend": metadata.platform,
        "max_batch_size": 0,
        "input": [{**of(spec), "optional": spec.optional} for spec in metadata.inputs],
        "output": [of(spec) for spec in metadata.outputs],
        "instance_group": [],
        "model_transaction_policy": {"decoupled": metadata.decoupled},
    }
