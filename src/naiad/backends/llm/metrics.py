"""What a language model measures, under vLLM's names, so that its dashboards and HPA rules work.

Counters of the engine arrive with every step and start again with a new process; the ones here
only grow. Everything is labelled with `model_name` and `engine` (always 0), as vLLM labels it.
"""

from __future__ import annotations

from collections.abc import Iterator

from naiad.core.generation import GenerateDelta
from naiad.core.metrics import AnyFamily, Counter, Family, Gauge, Histogram
from naiad.engine.config import EngineConfig
from naiad.engine.messages import EngineRequest, EngineStats, Ready, StepOutputs

_LABELS = ("model_name", "engine")
# The buckets of vllm/v1/metrics/loggers.py.
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_NEXT_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0),
    *(50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_NUM_ANSWERS = (1, 2, 5, 10, 20)
_NS = 1e-9


class EngineMetrics:
    """The families of one model and the calls that feed them; all on the event loop's thread.

    Args:
        model_name: Value of the label.
    """

    def __init__(self, model_name: str) -> None:
        self._labels = (model_name, "0")
        self._families: list[AnyFamily] = []
        self._last = EngineStats()
        self._gauges()
        self._counters()
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Time between tokens of one answer.", _NEXT_TOKEN_S
        )
        # The name of earlier releases, and of Triton's vLLM backend, for the same observations.
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "As inter_token_latency_seconds.", _NEXT_TOKEN_S
        )
        self._per_token.counts = self.inter_token.counts
        self._latencies()
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in one step.", _STEP_TOKENS
        )
        self._num_answers = self._histogram(
            "request_params_n", "Answers asked for per request.", _NUM_ANSWERS
        )

    def loaded(self, info: Ready, config: EngineConfig) -> None:
        """The engine is ready for the first time: what depends on the model's size."""
        sizes = tuple(_one_two_five(info.max_model_len))
        self._prompt_tokens_each = self._histogram(
            "request_prompt_tokens", "Tokens of one prompt.", sizes
        )
        self._generated_each = self._histogram(
            "request_generation_tokens", "Tokens of one answer.", sizes
        )
        self._max_tokens = self._histogram(
            "request_params_max_tokens", "max_tokens per request, the context considered.", sizes
        )
        facts = {
            "block_size": str(config.kv_page_tokens),
            "enable_prefix_caching": str(config.prefix_cache),
            "num_kv_tokens": str(info.kv_capacity_tokens),
            "cache_dtype": info.dtype,
            "device": info.device,
        }
        family = Family(
            "vllm:cache_config_info",
            "Configuration of the KV cache.",
            Gauge,
            (*_LABELS, *facts),
        )
        family.labels(*self._labels, *facts.values()).set(1)
        self._families.append(family)

    def accepted(self, message: EngineRequest) -> None:
        """A request is about to be sent to the engine."""
        self._num_answers.observe(message.sampling.n)
        self._max_tokens.observe(message.sampling.max_tokens)
        self._prompt_tokens_each.observe(len(message.prompt_token_ids))

    def stepped(self, outputs: StepOutputs, _now_ns: int) -> None:
        """A step's report arrived."""
        new, last = outputs.stats, self._last
        self._last = new
        if new.num_steps < last.num_steps:  # a new process counts from zero
            last = EngineStats()
        self._num_prompt_tokens.inc(new.num_prompt_tokens - last.num_prompt_tokens)
        self._num_generated.inc(new.num_generated_tokens - last.num_generated_tokens)
        self._num_queries.inc(new.num_prefix_queries_tokens - last.num_prefix_queries_tokens)
        self._num_hits.inc(new.num_prefix_hit_tokens - last.num_prefix_hit_tokens)
        self._num_preemptions.inc(new.num_preemptions - last.num_preemptions)
        if new.num_step_tokens:
            self._step_tokens.observe(new.num_step_tokens)

    def first_token(self, seconds: float) -> None:
        """An answer has begun, this long after its request arrived."""
        self._first_token_s.observe(seconds)

    def finished(self, delta: GenerateDelta, num_tokens: int) -> None:
        """An answer's last delta: it has a finish reason and timing."""
        assert delta.finish_reason is not None
        assert delta.timing is not None
        timing = delta.timing
        decode_s = (timing.last_token_ns - timing.first_token_ns) * _NS
        self._success.labels(*self._labels, delta.finish_reason.value).inc()
        self._generated_each.observe(num_tokens)
        self._e2e_s.observe((timing.last_token_ns - timing.arrival_ns) * _NS)
        self._queue_s.observe((timing.first_scheduled_ns - timing.arrival_ns) * _NS)
        self._inference_s.observe((timing.last_token_ns - timing.first_scheduled_ns) * _NS)
        self._prefill_s.observe((timing.first_token_ns - timing.first_scheduled_ns) * _NS)
        self._decode_s.observe(decode_s)
        if num_tokens > 1:
            self._mean_token_s.observe(decode_s / (num_tokens - 1))

    def ended_early(self, num_answers: int, reason: str) -> None:
        """Answers that never finished: `abort` (the reader left) or `error`."""
        self._success.labels(*self._labels, reason).inc(num_answers)

    def families(self, stats: EngineStats, num_restarts: int) -> list[AnyFamily]:
        """Everything, as a scrape reports it; `stats` are the newest."""
        self._num_running.set(stats.num_running)
        self._num_waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.kv_usage)
        self._num_restarts.value = num_restarts
        self._per_token.sum = self.inter_token.sum  # the counts are one list
        return list(self._families)

    def _gauges(self) -> None:
        self._num_running = self._gauge("num_requests_running", "Sequences being computed.")
        self._num_waiting = self._gauge("num_requests_waiting", "Sequences waiting for a place.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.")

    def _counters(self) -> None:
        self._num_queries = self._counter(
            "prefix_cache_queries_total", "Tokens looked up in the prefix cache."
        )
        self._num_hits = self._counter(
            "prefix_cache_hits_total", "Tokens found in the prefix cache."
        )
        self._num_preemptions = self._counter("num_preemptions_total", "Sequences preempted.")
        self._num_prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens computed.")
        self._num_generated = self._counter("generation_tokens_total", "Tokens generated.")
        self._success = Family(
            "vllm:request_success_total",
            "Answers ended, by reason: stop, length, abort or error.",
            Counter,
            (*_LABELS, "finished_reason"),
        )
        self._families.append(self._success)
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(*self._labels, reason)
        restarts = Family(
            "naiad:engine_restarts_total", "Engine processes started anew.", Counter, _LABELS
        )
        self._num_restarts = restarts.labels(*self._labels)
        self._families.append(restarts)

    def _latencies(self) -> None:
        self._first_token_s = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN_S
        )
        self._mean_token_s = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time between tokens, one observation per answer.",
            _NEXT_TOKEN_S,
        )
        self._e2e_s = self._histogram(
            "e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_S
        )
        self._queue_s = self._histogram(
            "request_queue_time_seconds", "Arrival to first scheduled.", _REQUEST_S
        )
        self._inference_s = self._histogram(
            "request_inference_time_seconds", "First scheduled to last token.", _REQUEST_S
        )
        self._prefill_s = self._histogram(
            "request_prefill_time_seconds", "First scheduled to first token.", _REQUEST_S
        )
        self._decode_s = self._histogram(
            "request_decode_time_seconds", "First to last token.", _REQUEST_S
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        family = Family(f"vllm:{name}", text, Gauge, _LABELS)
        self._families.append(family)
        return family.labels(*self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        family = Family(f"vllm:{name}", text, Counter, _LABELS)
        self._families.append(family)
        return family.labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Family(f"vllm:{name}", text, Histogram, _LABELS, buckets)
        self._families.append(family)
        return family.labels(*self._labels)


def _one_two_five(limit: int) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ... up to `limit`."""
    scale = 1
    while True:
        for factor in (1, 2, 5):
            if factor * scale > limit:
                return
            yield factor * scale
        scale *= 10
