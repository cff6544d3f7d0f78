"""What each model has served: plain integers, shown as Triton's statistics and as its metrics.

Updated once per request, never per token. Durations are nanoseconds here and in the statistics
reply, microseconds in the metrics, as Triton has them.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from naiad.core.errors import Kind, NaiadError
from naiad.core.metrics import AnyFamily, Counter, Family, Gauge
from naiad.core.model import InferUsage

LABELS = ("model", "version")


class FailureReason(enum.StrEnum):
    """The `reason` label of `nv_inference_request_failure`; all four are always present."""

    REJECTED = "REJECTED"  # never ran: queue full, not ready, timed out
    CANCELED = "CANCELED"  # the caller went away
    BACKEND = "BACKEND"  # the model failed
    OTHER = "OTHER"  # the request was wrong


_REASON_BY_KIND = {
    Kind.INVALID: FailureReason.OTHER,
    Kind.NOT_FOUND: FailureReason.OTHER,
    Kind.TOO_LARGE: FailureReason.OTHER,
    Kind.OVERLOADED: FailureReason.REJECTED,
    Kind.UNAVAILABLE: FailureReason.REJECTED,
    Kind.UNSUPPORTED: FailureReason.OTHER,
    Kind.CANCELLED: FailureReason.CANCELED,
    Kind.TIMED_OUT: FailureReason.REJECTED,
    Kind.INTERNAL: FailureReason.BACKEND,
}


def failure_reason(error: BaseException) -> FailureReason:
    """Under which reason a request that ended with `error` is counted."""
    if isinstance(error, NaiadError):
        return _REASON_BY_KIND[error.kind]
    return FailureReason.BACKEND if isinstance(error, Exception) else FailureReason.CANCELED


class ModelStatistics:
    """Lifetime counters of one model version; there is no reset."""

    def __init__(self, name: str, version: str, load_s: float | None = None) -> None:
        self.name = name
        self.version = version
        self.load_s = load_s
        self.last_inference_ms = 0
        self.num_success = 0
        self.num_failed = dict.fromkeys(FailureReason, 0)
        self.num_pending = 0
        """Accepted, and nothing answered yet."""
        self.success_ns = 0
        self.failed_ns = 0
        self.queue_ns = 0
        self.compute_input_ns = 0
        self.compute_infer_ns = 0
        self.compute_output_ns = 0

    def succeeded(self, request_ns: int, usage: InferUsage) -> None:
        """Count one request that was answered completely."""
        self.num_success += 1
        self.success_ns += request_ns
        self.queue_ns += usage.queue_ns
        self.compute_input_ns += usage.compute_input_ns
        self.compute_infer_ns += usage.compute_infer_ns
        self.compute_output_ns += usage.compute_output_ns
        self.last_inference_ms = time.time_ns() // 1_000_000

    def failed(self, request_ns: int, error: BaseException) -> None:
        """Count one request that was not."""
        self.num_failed[failure_reason(error)] += 1
        self.failed_ns += request_ns

    def reply(self) -> dict[str, Any]:
        """The model's entry in `model_stats`; perf_analyzer indexes every key."""
        success = self.num_success

        def of(count: int, ns: int) -> dict[str, int]:
            return {"count": count, "ns": ns}

        compute = {
            "compute_input": of(success, self.compute_input_ns),
            "compute_infer": of(success, self.compute_infer_ns),
            "compute_output": of(success, self.compute_output_ns),
        }
        return {
            "name": self.name,
            "version": self.version,
            "last_inference": self.last_inference_ms,
            "inference_count": success,
            "execution_count": success,
            "inference_stats": {
                "success": of(success, self.success_ns),
                "fail": of(sum(self.num_failed.values()), self.failed_ns),
                "queue": of(success, self.queue_ns),
                **compute,
                "cache_hit": of(0, 0),
                "cache_miss": of(0, 0),
            },
            "response_stats": {},
            "batch_stats": [{"batch_size": 1, **compute}] if success else [],
            "memory_usage": [],
        }


_COUNTERS = (
    ("nv_inference_request_success", "Number of successful inference requests, all batch sizes"),
    ("nv_inference_count", "Number of inferences performed"),
    ("nv_inference_exec_count", "Number of model executions performed"),
    ("nv_inference_request_duration_us", "Cumulative inference request duration in microseconds"),
    ("nv_inference_queue_duration_us", "Cumulative inference queuing duration in microseconds"),
    ("nv_inference_compute_input_duration_us", "Cumulative compute input duration in microseconds"),
    (
        "nv_inference_compute_infer_duration_us",
        "Cumulative compute inference duration in microseconds",
    ),
    (
        "nv_inference_compute_output_duration_us",
        "Cumulative inference compute output duration in microseconds",
    ),
)


def metric_families(models: Sequence[ModelStatistics]) -> Iterable[AnyFamily]:
    """Triton's `nv_inference_*` families, made anew for each scrape."""
    families = [Family(name, text, Counter, LABELS) for name, text in _COUNTERS]
    for model in models:
        labels = (model.name, model.version)
        for family, value in zip(families, _counter_values(model), strict=True):
            family.labels(*labels).inc(value)
    return [*families, *_other_families(models)]


def _counter_values(model: ModelStatistics) -> tuple[int, ...]:
    return (
        model.num_success,
        model.num_success,
        model.num_success,
        model.success_ns // 1000,
        model.queue_ns // 1000,
        model.compute_input_ns // 1000,
        model.compute_infer_ns // 1000,
        model.compute_output_ns // 1000,
    )


def _other_families(models: Sequence[ModelStatistics]) -> Iterator[AnyFamily]:
    failure = Family(
        "nv_inference_request_failure",
        "Number of failed inference requests, all batch sizes",
        Counter,
        (*LABELS, "reason"),
    )
    pending = Family(
        "nv_inference_pending_request_count",
        "Instantaneous number of pending requests awaiting execution per-model.",
        Gauge,
        LABELS,
    )
    load = Family("nv_model_load_duration_secs", "Model load time in seconds", Gauge, LABELS)
    for model in models:
        labels = (model.name, model.version)
        for reason, count in model.num_failed.items():
            failure.labels(*labels, reason.value).inc(count)
        pending.labels(*labels).set(model.num_pending)
        if model.load_s is not None:
            load.labels(*labels).set(model.load_s)
    yield failure
    yield pending
    if load.children():
        yield load
