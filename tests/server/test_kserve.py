"""The KServe v2 routes in JSON, by hand and through Triton's own client."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from naiad.backends.identity import IdentityModel
from naiad.backends.scripted import ScriptedLanguageModel, fail_at
from naiad.core.errors import InternalError
from naiad.core.tensor import DataType
from naiad.server.http.kserve import ModelPath, parse_path
from tests.server.conftest import SCRIPT, Start

TEXT = "".join(SCRIPT)
IN_JSON = [d for d in DataType if d not in (DataType.FP16, DataType.BF16)]


def tensor(datatype: str, shape: list[int], data: Any, name: str = "INPUT0") -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


@pytest.mark.parametrize("datatype", IN_JSON)
async def test_every_datatype_comes_back(start: Start, datatype: DataType) -> None:
    data: list[Any] = [0, 1, 2, 3]
    if datatype is DataType.BYTES:
        data = ["", "é", '"', "x"]
    elif datatype is DataType.BOOL:
        data = [True, False, True, True]
    async with start(IdentityModel(datatypes=(datatype,))) as running:
        for form in (data, [data[:2], data[2:]], [[data]]):
            body = {"id": "7", "inputs": [tensor(datatype.value, [2, 2], form)], "x": 1}
            reply = await running.post("/v2/models/identity/infer", body)
            assert reply.json() == {
                "id": "7",
                "model_name": "identity",
                "model_version": "1",
                "outputs": [
                    {"name": "OUTPUT0", "datatype": datatype.value, "shape": [2, 2], "data": data}
                ],
            }


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            [],
            "Got input(s) [], but missing required input(s) ['INPUT0']",
        ),
        (
            [tensor("INT32", [1, 1], [1])],
            "data-type is 'INT32', but model 'identity' expects 'FP32'",
        ),
        (
            [tensor("FP32", [1], [1])],
            "unexpected shape for input 'INPUT0' for model 'identity'. Expected [-1,-1], got [1]",
        ),
        (
            [tensor("FP32", [1, 1], [1], "X")],
            "unexpected inference input 'X', allowed inputs are: INPUT0",
        ),
        ([tensor("FP32", [1, 2], [1])], "has 1 values, its shape [1, 2] needs 2"),
        ([tensor("FP32", [1, 1], ["1"])], "is not FP32"),
        ([tensor("UINT8", [1, 1], [256])], "is not UINT8"),
        ([tensor("INT32", [1, 1], [1.5])], "is not INT32"),
        ([tensor("FP16", [1, 1], [1])], "FP16 cannot be sent as JSON"),
        ([tensor("FP99", [1, 1], [1])], "unknown datatype 'FP99'"),
        ([{"name": "INPUT0", "datatype": "FP32", "shape": [1, 1]}], "has no data"),
    ],
)
async def test_what_does_not_fit_is_400_in_tritons_words(
    start: Start, inputs: list[Any], message: str
) -> None:
    async with start(IdentityModel()) as running:
        reply = await running.post("/v2/models/identity/infer", {"inputs": inputs})

    assert reply.status_code == 400
    assert message in reply.json()["error"]


async def test_outputs_can_be_chosen_and_unknown_ones_are_refused(start: Start) -> None:
    model = IdentityModel(datatypes=(DataType.FP32, DataType.INT8))
    inputs = [tensor("FP32", [1, 1], [0.5]), tensor("INT8", [1, 1], [7], "INPUT1")]
    async with start(model) as running:
        body = {"inputs": inputs, "outputs": [{"name": "OUTPUT1"}]}
        one = await running.post("/v2/models/identity/infer", body)
        body["outputs"] = [{"name": "Y"}]
        none = await running.post("/v2/models/identity/versions/1/infer", body)

    assert [output["name"] for output in one.json()["outputs"]] == ["OUTPUT1"]
    assert none.status_code == 400
    assert "unexpected inference output 'Y'" in none.json()["error"]


async def test_unknown_names_have_tritons_statuses(start: Start) -> None:
    async with start() as running:
        cases = {
            "/v2/models/nobody": (400, "Request for unknown model: 'nobody' is not found"),
            "/v2/models/scripted/versions/7": (
                404,
                "Request for unknown model: 'scripted' version 7 is not found",
            ),
            "/v2/models/nobody/stats": (400, "requested model 'nobody' is not available"),
            "/v2/nothing": (404, "Not Found"),
            "/v2/models/scripted/infer": (405, "Method Not Allowed"),
        }
        for path, (status, message) in cases.items():
            reply = await running.http.get(path)
            assert (reply.status_code, reply.json()) == (status, {"error": message}), path
        assert (await running.http.post("/v2")).json() == {"error": "Method Not Allowed"}
        binary = await running.http.post(
            "/v2/models/scripted/infer",
            content=b"{}",
            headers={"inference-header-content-length": "2"},
        )
        assert binary.status_code == 501


def test_paths_are_read_from_their_end() -> None:
    assert parse_path(b"/v2/models/a") == ModelPath("a", "", "")
    assert parse_path(b"/v2/models/a%2Fb/infer?x=1") == ModelPath("a/b", "", "infer")
    assert parse_path(b"/v2/models/a/b/versions/3/stats") == ModelPath("a/b", "3", "stats")
    assert parse_path(b"/v2/models/stats") == ModelPath("", "", "stats")
    assert parse_path(b"/v2/models/") is None


async def test_generate_prepends_the_prompt_unless_told_not_to(start: Start) -> None:
    async with start() as running:
        path = "/v2/models/scripted/generate"
        with_prompt = await running.post(path, {"text_input": "Tell: ", "max_tokens": 1})
        vllm = {"text_input": "a", "parameters": {"stream": False, "temperature": 0}}
        tensorrt = {
            "text_input": "a",
            "max_tokens": 20,
            "bad_words": "",
            "stop_words": "",
            "pad_id": 2,
            "end_id": 2000,
            "exclude_input_in_output": True,
        }

        assert with_prompt.json() == {
            "model_name": "scripted",
            "model_version": "1",
            "text_output": "Tell: Once",
        }
        assert (await running.post(path, vllm)).json()["text_output"] == "a" + TEXT
        assert (await running.post(path, tensorrt)).json()["text_output"] == TEXT


async def test_generate_stream_sends_events_without_an_end_mark(start: Start) -> None:
    async with start() as running:
        body = {"id": "q", "text_input": "a", "stream": True}
        reply = await running.post("/v2/models/scripted/generate_stream", body)
        refused = await running.post("/v2/models/scripted/generate", body)

    events = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line]
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "".join(event["text_output"] for event in events) == TEXT
    assert {event["id"] for event in events} == {"q"}
    assert refused.status_code == 501
    assert "generate stream" in refused.json()["error"]


async def test_generate_stream_tells_an_error_by_status_or_by_event(start: Start) -> None:
    early = ScriptedLanguageModel(SCRIPT, name="early", before_token=fail_at(0, InternalError("x")))
    late = ScriptedLanguageModel(SCRIPT, name="late", before_token=fail_at(3, InternalError("x")))
    body = {"text_input": "a", "stream": True}
    async with start(early, late) as running:
        first = await running.post("/v2/models/early/generate_stream", body)
        later = await running.post("/v2/models/late/generate_stream", body)

    assert first.status_code == 500
    assert "internal error" in first.json()["error"]
    assert later.status_code == 200
    assert json.loads(later.text.split("\n\n")[-2][6:]).keys() == {"error"}


async def test_health_version_and_metrics_ports(start: Start) -> None:
    async with start() as running:
        for path in ("/v2/health/live", "/v2/health/ready", "/health", "/ping"):
            reply = await running.http.get(path)
            assert (reply.status_code, reply.text) == (200, "")
        assert "version" in (await running.http.get("/version")).json()
        await running.post("/v1/completions", {"model": "scripted", "prompt": "a"})
        await running.post("/v1/completions", {"model": "scripted", "prompt": ""})
        here = (await running.http.get("/metrics")).text
        base = f"http://127.0.0.1:{running.server.metrics_port}"
        there = (await running.http.get(f"{base}/metrics")).text
        other = await running.http.get(f"{base}/whatever")

    assert here == there
    assert 'nv_inference_request_success{model="scripted",version="1"} 1\n' in there
    assert (other.status_code, other.text) == (200, "")
    values = {  # the parser appends _total to counters, the exposition does not
        (sample.name.removesuffix("_total"), sample.labels.get("reason", "")): sample.value
        for family in text_string_to_metric_families(there)
        for sample in family.samples
    }
    assert values["nv_inference_request_success", ""] == 1
    assert values["nv_inference_request_failure", "OTHER"] == 1
    assert values["nv_inference_request_failure", "CANCELED"] == 0
    assert values["nv_inference_pending_request_count", ""] == 0
    assert values["nv_inference_count", ""] == values["nv_inference_exec_count", ""] == 1
    assert values["nv_inference_request_duration_us", ""] > 0
    assert not math.isnan(values["nv_inference_queue_duration_us", ""])


async def test_statistics_count_text_and_tensors_alike(start: Start) -> None:
    async with start() as running:
        await running.post("/v1/completions", {"model": "scripted", "prompt": "a"})
        await running.post("/v2/models/scripted/generate", {"text_input": "a"})
        body = (await running.http.get("/v2/models/stats")).json()

    (model,) = body["model_stats"]
    stats = model["inference_stats"]
    assert (model["name"], model["version"], model["inference_count"]) == ("scripted", "1", 2)
    for key in ("queue", "compute_input", "compute_infer", "compute_output"):
        assert stats[key]["count"] == 2
    assert stats["success"]["ns"] >= stats["compute_infer"]["ns"] > 0
    assert stats["queue"]["ns"] > 0
    assert stats.keys() >= {"fail", "cache_hit", "cache_miss"}


async def test_metrics_can_be_off(start: Start) -> None:
    async with start(allow_metrics=False) as running:
        assert (await running.http.get("/metrics")).status_code == 404


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outputs": [{"name": "OUTPUT0", "parameters": {"binary": True}}]}, "'binary'"),
        ({"outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": 1}}]}, "binary_data"),
        ({"parameters": {"binary_data_output": "yes"}}, "binary_data_output"),
    ],
)
async def test_an_outputs_parameters_are_known_and_of_their_type(
    start: Start, fields: dict[str, Any], message: str
) -> None:
    async with start(IdentityModel()) as running:
        body = {"inputs": [tensor("FP32", [1, 1], [0.5])], **fields}
        reply = await running.post("/v2/models/identity/infer", body)

    assert reply.status_code == 400
    assert message in reply.json()["error"]


async def test_who_asks_for_binary_outputs_gets_json(start: Start) -> None:
    """The server does not offer `binary_tensor_data`; Triton's clients read what comes."""
    async with start(IdentityModel()) as running:
        body = {
            "inputs": [tensor("FP32", [1, 1], [0.5])],
            "outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": True}}],
            "parameters": {"binary_data_output": True},
        }
        reply = await running.post("/v2/models/identity/infer", body)
        offered = (await running.http.get("/v2")).json()["extensions"]

    assert reply.json()["outputs"][0]["data"] == [0.5]
    assert "inference-header-content-length" not in reply.headers
    assert "binary_tensor_data" not in offered
