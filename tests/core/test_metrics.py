"""Counters that cost little, and an exposition that Prometheus' own parser reads."""

from __future__ import annotations

import math
import subprocess
import sys
import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from naiad.core.metrics import AnyFamily, Counter, Family, Gauge, Histogram, Registry


def exposed(*families: AnyFamily) -> str:
    registry = Registry()
    registry.register(lambda: families)
    return registry.exposition().decode()


def parsed(text: str) -> dict[str, float]:
    """`name|label=value` -> value. This parser, unlike Prometheus, renames counters to `_total`."""
    return {
        sample.name + "".join(f"|{k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_names_come_out_exactly_as_given() -> None:
    success = Family("nv_inference_request_success", "Requests served", Counter, ("model",))
    success.labels("gpt2").inc()
    tokens = Family("vllm:prompt_tokens_total", "Prompt tokens", Counter, ("model_name",))
    tokens.labels("gpt2").inc(7)
    running = Family("vllm:num_requests_running", "Running now", Gauge)
    running.labels().set(3)

    text = exposed(success, tokens, running)
    assert "# TYPE nv_inference_request_success counter\n" in text
    assert 'nv_inference_request_success{model="gpt2"} 1\n' in text
    assert "# TYPE vllm:prompt_tokens_total counter\n" in text
    assert 'vllm:prompt_tokens_total{model_name="gpt2"} 7\n' in text
    assert "vllm:num_requests_running 3\n" in text
    assert set(parsed(text)) == {
        "nv_inference_request_success_total|model=gpt2",
        "vllm:prompt_tokens_total|model_name=gpt2",
        "vllm:num_requests_running",
    }


def test_a_histogram_counts_at_or_below_each_bound() -> None:
    seconds = Family("ttft_seconds", "Time to first token", Histogram, buckets=(0.1, 1, 10))
    for value in (0.1, 0.5, 1, 99):
        seconds.labels().observe(value)

    assert parsed(exposed(seconds)) == {
        "ttft_seconds_bucket|le=0.1": 1,
        "ttft_seconds_bucket|le=1.0": 3,
        "ttft_seconds_bucket|le=10.0": 3,
        "ttft_seconds_bucket|le=+Inf": 4,
        "ttft_seconds_count": 4,
        "ttft_seconds_sum": 100.6,
    }


def test_labels_returns_the_same_child_until_it_is_removed() -> None:
    family = Family("requests", "Requests", Counter, ("model", "version"))
    family.labels("a", "1").inc()
    assert family.labels("a", "1") is family.labels("a", "1")

    family.remove("a", "1")
    family.remove("never", "seen")
    assert parsed(exposed(family)) == {}


def test_sources_that_share_a_name_appear_as_one_family() -> None:
    registry = Registry()
    for model in ("a", "b"):
        family = Family("requests", "Requests", Counter, ("model",))
        family.labels(model).inc()
        registry.register(lambda family=family: [family])

    text = registry.exposition().decode()
    assert text.count("# TYPE requests counter") == 1
    assert parsed(text) == {"requests_total|model=a": 1, "requests_total|model=b": 1}


def test_a_name_with_two_kinds_is_refused() -> None:
    with pytest.raises(ValueError, match="requests is registered with different kinds"):
        exposed(Family("requests", "", Counter), Family("requests", "", Gauge))


def test_wrong_families_are_refused_where_they_are_made() -> None:
    with pytest.raises(ValueError, match="a histogram needs buckets"):
        Family("seconds", "", Histogram)
    with pytest.raises(ValueError, match="must strictly ascend"):
        Family("seconds", "", Histogram, buckets=(1, 1)).labels()
    with pytest.raises(ValueError, match="has labels"):
        Family("requests", "", Counter, ("model",)).labels()


def test_special_values_are_spelled_as_prometheus_does() -> None:
    family = Family("g", "", Gauge, ("v",))
    for name, value in (("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf)):
        family.labels(name).set(value)
    text = exposed(family)
    assert 'g{v="nan"} NaN' in text
    assert 'g{v="inf"} +Inf' in text
    assert 'g{v="-inf"} -Inf' in text


@given(
    label=st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\r\x85\u2028\u2029")
    ),
    value=st.floats(allow_nan=False) | st.integers(0, 2**63),
)
def test_any_label_and_value_survive_the_parser(label: str, value: float) -> None:
    family = Family("g", 'help\nwith \\ and "quotes"', Gauge, ("label",))
    family.labels(label).set(value)
    (read,) = text_string_to_metric_families(exposed(family))
    assert read.samples[0].labels == {"label": label}
    assert read.samples[0].value == value


def test_an_update_costs_well_under_a_microsecond() -> None:
    histogram = Histogram([0.001 * 2**power for power in range(15)])
    seconds = min(timeit.repeat(lambda: histogram.observe(0.3), number=20_000, repeat=5))
    assert seconds / 20_000 < 1e-6  # about 0.1 µs on an idle core; the margin is for busy ones


def test_importing_it_does_not_import_prometheus_client() -> None:
    code = "import sys, naiad.core.metrics; print('prometheus_client' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
