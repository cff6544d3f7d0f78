"""The models that a server serves, by every name they answer to, and the counting around them.

Both ways into a model, tensors and text, pass through `ServedModel`, so a request is counted once
whichever protocol it came by. Whether a model that is not ready refuses a request or has it wait is
the model's own decision. Loading, versions and reload belong to the repository.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from typing import Any, TypeVar

from naiad.core.errors import Cancelled, InvalidRequest, NotFound
from naiad.core.generation import GenerateDelta, GenerateRequest, GenerateTiming
from naiad.core.language import LanguageModel
from naiad.core.metrics import AnyFamily, Registry
from naiad.core.model import InferRequest, InferResponse, InferUsage, Model, ModelMetadata
from naiad.server.statistics import ModelStatistics, metric_families

_Item = TypeVar("_Item")


class UnknownModel(NotFound):
    """No model of that name. Facts: `model`. Triton calls it a bad request, OpenAI not found."""


class UnknownVersion(NotFound):
    """The model exists, that version of it does not. Facts: `model`, `version`."""


class ServedModel:
    """One model version and what it has served."""

    def __init__(self, model: Model, load_s: float | None = None) -> None:
        self.model = model
        self.metadata: ModelMetadata = model.metadata
        self.version = self.metadata.versions[-1]
        self.statistics = ModelStatistics(self.metadata.name, self.version, load_s)

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """`Model.infer`, counted."""
        with _Counting(self.statistics) as counting:
            responses = self.model.infer(request)
            try:
                async for response in responses:
                    counting.answered()
                    if response.usage is not None:
                        counting.usage = response.usage
                    yield response
            finally:
                await close_iterator(responses)
            counting.completed = True

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateDelta, None]:
        """`LanguageModel.generate`, counted; raises `InvalidRequest` if it is no language model."""
        with _Counting(self.statistics) as counting:
            model = self.language_model()
            num_unfinished = request.sampling.n
            deltas = model.generate(request)
            try:
                async for delta in deltas:
                    if delta.prompt is not None:
                        counting.answered()
                    if delta.finish_reason is not None:
                        num_unfinished -= 1
                        counting.add_timing(delta.timing)
                        counting.completed = num_unfinished == 0
                    yield delta
            finally:
                await close_iterator(deltas)

    def language_model(self) -> LanguageModel:
        """The model as one that continues text."""
        if isinstance(self.model, LanguageModel):
            return self.model
        raise InvalidRequest(
            f"model '{self.metadata.name}' does not generate text",
            hint="use /v2/models/{name}/infer",
            param="model",
        )


async def close_iterator(iterator: AsyncIterator[Any]) -> None:
    """Close an iterator of a model, which cancels what is left of its request."""
    aclose = getattr(iterator, "aclose", None)
    if aclose is not None:
        await aclose()


class _Counting:
    """Counts one request when it leaves, however it leaves."""

    __slots__ = ("_arrival_ns", "_pending", "_statistics", "_timing", "completed", "usage")

    def __init__(self, statistics: ModelStatistics) -> None:
        self._statistics = statistics
        self._arrival_ns = time.monotonic_ns()
        self._pending = False
        self._timing: GenerateTiming | None = None
        self.usage: InferUsage | None = None
        self.completed = False

    def __enter__(self) -> _Counting:
        self._statistics.num_pending += 1
        self._pending = True
        return self

    def answered(self) -> None:
        """The model has begun to answer: the request no longer waits."""
        if self._pending:
            self._pending = False
            self._statistics.num_pending -= 1

    def add_timing(self, timing: GenerateTiming | None) -> None:
        """Widen what is known so far by one answer's stamps."""
        known = self._timing
        if known is None or timing is None:
            self._timing = timing or known
            return
        self._timing = GenerateTiming(
            arrival_ns=min(known.arrival_ns, timing.arrival_ns),
            first_scheduled_ns=min(known.first_scheduled_ns, timing.first_scheduled_ns),
            first_token_ns=min(known.first_token_ns, timing.first_token_ns),
            last_token_ns=max(known.last_token_ns, timing.last_token_ns),
        )

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.answered()
        request_ns = time.monotonic_ns() - self._arrival_ns
        if self.completed:
            self._statistics.succeeded(request_ns, self._final_usage(request_ns))
        elif isinstance(error, (asyncio.CancelledError, GeneratorExit)) or error is None:
            self._statistics.failed(request_ns, Cancelled("closed by the caller"))
        else:
            self._statistics.failed(request_ns, error)

    def _final_usage(self, request_ns: int) -> InferUsage:
        if self.usage is not None:
            return self.usage
        if self._timing is None:  # a plain model that does not say: all of it was computing
            return InferUsage(compute_infer_ns=request_ns)
        timing = self._timing
        return InferUsage(
            queue_ns=timing.first_scheduled_ns - timing.arrival_ns,
            compute_infer_ns=timing.last_token_ns - timing.first_scheduled_ns,
        )


class ModelTable:
    """Every served model by name and alias.

    Args:
        models: Models that are loaded already; the order is the order of listings.
        load_s: Seconds that loading took, by model name, where known.

    Raises:
        ValueError: two models answer to one name.
    """

    def __init__(self, models: Iterable[Model], load_s: Mapping[str, float] | None = None) -> None:
        self.served = [
            ServedModel(model, (load_s or {}).get(model.metadata.name)) for model in models
        ]
        self._by_name: dict[str, ServedModel] = {}
        for served in self.served:
            for name in (served.metadata.name, *served.metadata.aliases):
                if self._by_name.setdefault(name, served) is not served:
                    raise ValueError(f"two models answer to the name {name!r}")

    def names(self) -> Iterable[tuple[str, ServedModel]]:
        """Every name and alias with its model."""
        return self._by_name.items()

    def find(self, name: str, version: str = "") -> ServedModel:
        """The model called `name`; raises `UnknownModel` or `UnknownVersion`."""
        served = self._by_name.get(name)
        if served is None:
            raise UnknownModel(
                f"Request for unknown model: '{name}' is not found", model=name, param="model"
            )
        if version and version not in served.metadata.versions:
            raise UnknownVersion(
                f"Request for unknown model: '{name}' version {version} is not found",
                model=name,
                version=version,
            )
        return served

    def is_ready(self) -> bool:
        """Whether every model is."""
        return all(served.model.is_ready() for served in self.served)

    def register_metrics(self, registry: Registry) -> None:
        """Report all models' counters, and what the models measure themselves."""
        registry.register(lambda: metric_families([s.statistics for s in self.served]))
        registry.register(self._extra_families)

    def _extra_families(self) -> Iterable[AnyFamily]:
        return [family for served in self.served for family in served.model.extra_metrics()]
