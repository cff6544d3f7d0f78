"""Requests of the vLLM and TensorRT-LLM text models, as `GenerateRequest`s and back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from naiad.backends.scripted import ScriptedLanguageModel, wait_at
from naiad.core.errors import InvalidRequest, Unsupported
from naiad.core.model import InferRequest, InferResponse, RequestedOutput
from naiad.core.tensor import DataType, Tensor
from naiad.core.text_fields import LISTS, OUTPUTS, SCALARS
from naiad.core.text_tensors import infer_text

SCRIPT = ("one", " two", " three")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def model() -> ScriptedLanguageModel:
    return ScriptedLanguageModel(SCRIPT)


def tensor(name: str, value: Any) -> Tensor:
    datatype = {**SCALARS, **LISTS}[name]
    items = value if isinstance(value, list) else [value]
    array = np.empty((1, len(items)), datatype.numpy)  # batched, as the ensemble's clients send
    array[0] = [item.encode() if isinstance(item, str) else item for item in items]
    return Tensor(name, datatype, array.shape, array)


async def infer(
    model: ScriptedLanguageModel,
    inputs: dict[str, Any],
    parameters: dict[str, Any] | None = None,
    outputs: tuple[str, ...] = (),
) -> list[InferResponse]:
    request = InferRequest(
        model_name="m",
        inputs=tuple(tensor(name, value) for name, value in inputs.items()),
        outputs=tuple(RequestedOutput(name) for name in outputs),
        parameters=parameters or {},
    )
    return [response async for response in infer_text(model, request)]


def output(response: InferResponse, name: str) -> Any:
    found = next(tensor for tensor in response.outputs if tensor.name == name)
    return found.data.tolist()


async def test_the_prompt_is_prepended_unless_excluded(model: ScriptedLanguageModel) -> None:
    (whole,) = await infer(model, {"text_input": "say "})
    (excluded,) = await infer(model, {"text_input": "say ", "exclude_input_in_output": True})

    assert output(whole, "text_output") == [b"say one two three"]
    assert output(excluded, "text_output") == [b"one two three"]
    assert whole.usage is not None
    assert (whole.usage.num_input_tokens, whole.usage.num_output_tokens) == (1, 4)


async def test_a_stream_sends_deltas_and_never_the_prompt(model: ScriptedLanguageModel) -> None:
    responses = await infer(model, {"text_input": "say", "stream": True})

    assert [output(r, "text_output")[0] for r in responses] == [b"one", b" two", b" three", b""]
    assert [r.usage is not None for r in responses] == [False, False, False, True]
    with pytest.raises(InvalidRequest, match="never repeats"):
        await infer(model, {"text_input": "a", "stream": True, "exclude_input_in_output": False})


async def test_vllm_extras_come_when_asked_for(model: ScriptedLanguageModel) -> None:
    switches = [name for name in SCALARS if name.startswith("return_") and "logits" not in name]
    (response,) = await infer(model, {"text_input": "a b", **dict.fromkeys(switches, True)})

    assert {tensor.name for tensor in response.outputs} == set(OUTPUTS)
    assert output(response, "finish_reason") == [b"stop"]
    assert output(response, "num_input_tokens") == [2]
    assert output(response, "num_output_tokens") == [4]
    assert output(response, "cumulative_logprob")[0] == pytest.approx(-4 * 0.693147, abs=1e-4)
    assert len(json.loads(output(response, "logprobs")[0])) == 4
    assert np.array(output(response, "output_log_probs")).shape == (1, 4)
    assert output(response, "last_token_time_ns")[0] > output(response, "arrival_time_ns")[0]


async def test_several_answers_are_elements_of_one_output(model: ScriptedLanguageModel) -> None:
    (response,) = await infer(
        model, {"text_input": "a", "num_return_sequences": 2}, outputs=("text_output",)
    )
    stream = await infer(
        model, {"text_input": "a", "stream": True, "sampling_parameters": '{"n":2,"max_tokens":1}'}
    )

    assert output(response, "text_output") == [b"aone two three"] * 2
    assert [output(r, "text_output") for r in stream] == [[b"one", b""], [b"", b"one"]]


async def test_vllm_sampling_comes_as_json_or_as_parameters(model: ScriptedLanguageModel) -> None:
    options = {"temperature": "0.5", "top_k": 3, "max_tokens": "2", "ignore_eos": "true"}
    await infer(model, {"text_input": "a", "sampling_parameters": json.dumps(options)})
    await infer(model, {"text_input": "a"}, options)
    await infer(model, {"text_input": "a"}, {"priority": 0, "binary_data_output": True})

    first, second, third = model.requests
    assert first.sampling == second.sampling
    assert (first.sampling.temperature, first.sampling.max_tokens) == (0.5, 2)
    assert first.sampling.ignore_eos
    assert (third.sampling.max_tokens, third.priority) == (16, 0)


async def test_the_ensembles_tensors_are_sampling_parameters(model: ScriptedLanguageModel) -> None:
    await infer(
        model,
        {
            "text_input": "a",
            "max_tokens": 9,
            "min_tokens": 1,
            "stop_words": ["x", "y"],
            "bad_words": "",
            "end_id": 5,
            "pad_id": 5,
            "top_k": 4,
            "top_p": 0.0,
            "temperature": 0.5,
            "length_penalty": 1.0,
            "repetition_penalty": 1.5,
            "presence_penalty": 0.25,
            "frequency_penalty": 0.5,
            "seed": 2**63,
            "beam_width": 1,
            "return_context_logits": False,
        },
    )
    sampling = model.requests[0].sampling

    assert (sampling.max_tokens, sampling.min_tokens, sampling.seed) == (9, 1, 2**63)
    assert (sampling.stop, sampling.stop_token_ids) == (("x", "y"), (5,))
    assert (sampling.top_k, sampling.top_p, sampling.temperature) == (4, 1.0, 0.5)
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, 0.25)
    assert sampling.frequency_penalty == 0.5
    await infer(model, {"text_input": "a", "end_id": -1})
    assert model.requests[1].sampling.ignore_eos


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beam_width", 2),
        ("bad_words", ["x"]),
        ("return_context_logits", True),
        ("lora_task_id", 1),
        ("image", ["aGk="]),
        ("embedding_request", "{}"),
        ("guided_decoding_guide", "{}"),
        ("sampling_parameters", '{"lora_name":"x"}'),
        ("sampling_parameters", '{"best_of":3}'),
        ("sampling_parameters", '{"prompt_logprobs":1}'),
    ],
)
async def test_what_is_not_done_is_refused(
    model: ScriptedLanguageModel, name: str, value: Any
) -> None:
    with pytest.raises(Unsupported):
        await infer(model, {"text_input": "a", name: value})


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ({}, {}, "'text_input' is missing"),
        ({"text_input": ["a", "b"]}, {}, "2 elements"),
        ({"text_input": "a"}, {"temprature": 1}, "unknown field `temprature`"),
        ({"text_input": "a"}, {"temperature": "hot"}, "temperature"),
        ({"text_input": "a", "top_k": 1}, {"top_k": 2}, "as an input and as a parameter"),
        ({"text_input": "a", "sampling_parameters": "["}, {}, "not a JSON object"),
        (
            {"text_input": "a", "top_k": 1, "sampling_parameters": '{"top_k":2}'},
            {},
            "given twice",
        ),
        ({"text_input": b"\xff"}, {}, "not UTF-8"),
        ({"text_input": "a"}, {"priority": -1}, "priority"),
    ],
)
async def test_what_is_wrong_is_named(
    model: ScriptedLanguageModel, inputs: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await infer(model, inputs, parameters)


async def test_outputs_can_be_chosen(model: ScriptedLanguageModel) -> None:
    (response,) = await infer(model, {"text_input": "a"}, outputs=("finish_reason", "logprobs"))

    assert [tensor.name for tensor in response.outputs] == ["finish_reason", "logprobs"]
    with pytest.raises(InvalidRequest, match="unexpected inference output"):
        await infer(model, {"text_input": "a"}, outputs=("nothing",))


async def test_a_wrong_datatype_is_named(model: ScriptedLanguageModel) -> None:
    wrong = Tensor("top_k", DataType.FP32, (1,), np.array([1], np.float32))
    request = InferRequest(model_name="m", inputs=(tensor("text_input", "a"), wrong))
    with pytest.raises(InvalidRequest, match="data-type is 'FP32'"):
        await anext(infer_text(model, request))


async def test_priority_one_is_the_highest_and_zero_the_default() -> None:
    go_on = asyncio.Event()
    model = ScriptedLanguageModel(SCRIPT, max_running=1, before_token=wait_at(0, go_on))
    order: list[int] = []

    async def ask(priority: int) -> None:
        await infer(model, {"text_input": "a"}, {"priority": priority})
        order.append(priority)

    given = [2**63, 0, 3, 1, 100, 2, 7, 101]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ask(7))
        await model.until(lambda: model.num_running == 1)
        for number, priority in enumerate(given, 1):
            tasks.create_task(ask(priority))
            await model.until(lambda number=number: model.num_waiting == number)  # type: ignore[misc]
        go_on.set()

    assert order == [7, 1, 2, 3, 7, 100, 2**63, 0, 101]
