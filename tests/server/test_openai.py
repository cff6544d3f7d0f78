"""OpenAI's routes, read by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import openai
import pytest

from naiad.backends.identity import IdentityModel
from naiad.backends.scripted import ScriptedLanguageModel, fail_at
from naiad.core.errors import InternalError, Unavailable
from naiad.core.generation import (
    ChatPrompt,
    GenerateDelta,
    GenerateRequest,
    TextPrompt,
    TokensPrompt,
)
from tests.server.asgi import call, make_app
from tests.server.conftest import SCRIPT, Start

TEXT = "".join(SCRIPT)
encode = msgspec.json.encode
ASK: Any = [{"role": "user", "content": "Tell me a story"}]


async def test_a_chat_streams_role_first_then_text_then_usage(start: Start) -> None:
    async with start() as running:
        stream = await running.openai.chat.completions.create(
            model="scripted",
            messages=ASK,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(SCRIPT) + 1
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_chat_answers_in_one_piece(start: Start) -> None:
    async with start() as running:
        reply = await running.openai.chat.completions.create(
            model="scripted", messages=ASK, max_completion_tokens=3
        )

    assert reply.choices[0].message.content == "Once upon a"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 3
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 3
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_cached_tokens_are_counted_once_per_prompt(path: str) -> None:
    class Caching(ScriptedLanguageModel):
        async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateDelta]:
            async for delta in super().generate(request):
                if delta.prompt is None:
                    yield delta
                    continue
                prompt = msgspec.structs.replace(delta.prompt, num_cached_tokens=2)
                yield msgspec.structs.replace(delta, prompt=prompt)

    body = {"model": "scripted", "n": 3, "max_tokens": 1}
    body |= {"messages": ASK} if "chat" in path else {"prompt": ["a b c", "d e f g"]}
    reply = json.loads((await call(make_app(Caching(SCRIPT)), "POST", path, encode(body))).text)

    cached = 2 if "chat" in path else 4
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}


async def test_chat_without_a_limit_uses_the_context_and_completion_sixteen() -> None:
    model = ScriptedLanguageModel(["x "], max_model_len=64)
    app = make_app(model)
    chat = b'{"model":"scripted","messages":[{"role":"user","content":"a"}],"ignore_eos":true}'
    completion = b'{"model":"scripted","prompt":"a","ignore_eos":true}'

    assert b'"completion_tokens":62' in (await call(app, "POST", "/v1/chat/completions", chat)).text
    assert (
        b'"completion_tokens":16' in (await call(app, "POST", "/v1/completions", completion)).text
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_n_answers_keep_their_indexes(start: Start, stream: bool) -> None:
    async with start() as running:
        body = {"model": "scripted", "messages": ASK, "n": 3, "stream": stream}
        reply = await running.post("/v1/chat/completions", body)
        if not stream:
            choices = reply.json()["choices"]
            assert [choice["index"] for choice in choices] == [0, 1, 2]
            assert {choice["message"]["content"] for choice in choices} == {TEXT}
            return
    for index in range(3):
        assert reply.text.count(f'{{"index":{index},"delta":{{"role":"assistant"') == 1
    assert reply.text.endswith("data: [DONE]\n\n")


async def test_prompts_come_as_text_tokens_or_lists_of_either(start: Start) -> None:
    model = ScriptedLanguageModel(SCRIPT)
    async with start(model) as running:
        for prompt in ("a b", ["a", "b c"], [1, 2], [[1], [2, 3]]):
            reply = await running.openai.completions.create(
                model="scripted", prompt=prompt, n=2, max_tokens=2
            )
            wanted = 4 if isinstance(prompt[0], list) or prompt == ["a", "b c"] else 2
            assert [choice.index for choice in reply.choices] == list(range(wanted))
            assert {choice.text for choice in reply.choices} == {"Once upon"}
            assert reply.usage is not None
            assert reply.usage.completion_tokens == 2 * wanted
            assert reply.usage.prompt_tokens == (3 if wanted == 4 else 2)

    assert [request.prompt for request in model.requests] == [
        TextPrompt("a b"),
        TextPrompt("a"),
        TextPrompt("b c"),
        TokensPrompt((1, 2)),
        TokensPrompt((1,)),
        TokensPrompt((2, 3)),
    ]


async def test_log_probabilities_have_both_forms(start: Start) -> None:
    async with start() as running:
        chat = await running.openai.chat.completions.create(
            model="scripted", messages=ASK, logprobs=True, top_logprobs=2, max_tokens=2
        )
        text = await running.openai.completions.create(
            model="scripted", prompt="a", logprobs=2, max_tokens=2
        )
        stream = await running.openai.chat.completions.create(
            model="scripted", messages=ASK, logprobs=True, max_tokens=2, stream=True
        )
        streamed = [c.choices[0].logprobs async for c in stream if c.choices[0].logprobs]

    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert [token.token for token in content] == ["Once", " upon"]
    assert content[0].bytes == list(b"Once")
    assert [token.token for token in content[0].top_logprobs] == ["Once", " upon"]
    logprobs = text.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["Once", " upon"]
    assert logprobs.text_offset == [0, 4]
    assert logprobs.top_logprobs is not None
    assert list(logprobs.top_logprobs[0]) == ["Once", " upon"]
    assert [entry.content[0].token for entry in streamed if entry.content] == ["Once", " upon"]


async def test_stops_and_prompt_log_probabilities(start: Start) -> None:
    async with start() as running:
        body = {"model": "scripted", "prompt": "b a", "stop": ["time"], "prompt_logprobs": 1}
        choice = (await running.post("/v1/completions", body)).json()["choices"][0]

    assert choice["text"] == "Once upon a "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "time")
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert next(iter(second.values()))["decoded_token"] == "a"


async def test_every_sampling_field_reaches_the_model(start: Start) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {"17": -3.0},
        "seed": 2**64 - 1,
        "min_tokens": 1,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "max_tokens": 4,
    }
    model = ScriptedLanguageModel(SCRIPT)
    async with start(model) as running:
        body = {"model": "scripted", "messages": ASK, "priority": -3, "unknown": 1, **fields}
        assert (await running.post("/v1/chat/completions", body)).status_code == 200

    sampling = model.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == {
        **fields,
        "logit_bias": {17: -3.0},
        "stop_token_ids": (9,),
    }
    assert model.requests[0].priority == -3


async def test_text_parts_are_joined_and_other_parts_refused(start: Start) -> None:
    model = ScriptedLanguageModel(SCRIPT)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    async with start(model) as running:
        for content, status in ((parts, 200), (image, 400)):
            body = {"model": "scripted", "messages": [{"role": "user", "content": content}]}
            reply = await running.post("/v1/chat/completions", body)
            assert reply.status_code == status

    assert "image_url" in reply.json()["error"]["message"]
    prompt = model.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[0]["content"] == "one\ntwo"


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [{"type": "function"}]},
        {"functions": [{}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"best_of": 4},
        {"echo": True},
        {"suffix": "x"},
        {"use_beam_search": True},
        {"guided_json": {"type": "object"}},
        {"bad_words": ["x"]},
        {"modalities": ["text", "audio"]},
        {"truncate_prompt_tokens": 4},
        {"chat_template": "{{x}}"},
        {"add_special_tokens": True},
        {"cache_salt": "mine"},
        {"return_token_ids": True},
        {"reasoning_effort": "high"},
    ],
)
async def test_what_is_not_done_is_refused_with_a_reason(extra: dict[str, Any]) -> None:
    app = make_app(ScriptedLanguageModel(SCRIPT))
    reply = await _chat(app, extra)

    assert reply["error"]["code"] == "unsupported"
    assert next(iter(extra)) in reply["error"]["message"]


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": None, "functions": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"best_of": 1, "echo": False, "suffix": None},
        {"modalities": ["text"], "use_beam_search": False, "detokenize": True},
        {"cache_salt": "", "return_token_ids": False, "reasoning_effort": "none"},
    ],
)
async def test_values_that_ask_for_nothing_pass(extra: dict[str, Any]) -> None:
    assert "choices" in await _chat(make_app(ScriptedLanguageModel(SCRIPT)), extra)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**64}, None),
        ({"stop": ["a", ""]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
async def test_a_wrong_value_is_named(extra: dict[str, Any], param: str | None) -> None:
    reply = await _chat(make_app(ScriptedLanguageModel(SCRIPT)), extra)

    assert reply["error"]["type"] == "invalid_request_error"
    assert reply["error"]["param"] == param


async def _chat(app: Any, extra: dict[str, Any]) -> Any:
    body = {"model": "scripted", "messages": ASK, **extra}
    client = await call(app, "POST", "/v1/chat/completions", json.dumps(body).encode())
    return json.loads(client.text)


async def test_an_unknown_model_is_not_found(start: Start) -> None:
    async with start(IdentityModel()) as running:
        with pytest.raises(openai.NotFoundError) as caught:
            await running.openai.completions.create(model="nobody", prompt="a")
        with pytest.raises(openai.BadRequestError, match="does not generate text"):
            await running.openai.completions.create(model="identity", prompt="a")

    assert caught.value.code == "model_not_found"


async def test_an_error_before_the_first_token_decides_the_status(start: Start) -> None:
    model = ScriptedLanguageModel(SCRIPT, before_token=fail_at(0, Unavailable("restarting")))
    async with start(model) as running:
        with pytest.raises(openai.InternalServerError) as caught:
            await running.openai.completions.create(model="scripted", prompt="a", stream=True)

    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"


async def test_an_error_in_the_middle_is_an_event_and_says_no_internals(start: Start) -> None:
    model = ScriptedLanguageModel(SCRIPT, before_token=fail_at(2, InternalError("secret")))
    async with start(model) as running:
        body = {"model": "scripted", "prompt": "a", "stream": True}
        reply = await running.post("/v1/completions", body, headers={"x-request-id": "r-7"})
        with pytest.raises(openai.APIError, match="internal error"):
            async for _ in await running.openai.completions.create(
                model="scripted", prompt="a", stream=True
            ):
                pass

    assert reply.status_code == 200
    assert "secret" not in reply.text
    assert "r-7" in reply.text.split("data: ")[-2]
    assert reply.text.endswith("data: [DONE]\n\n")


async def test_models_are_listed_for_openai_and_kserve(start: Start) -> None:
    model = ScriptedLanguageModel(SCRIPT, name="org/story", aliases=("story",))
    async with start(model, IdentityModel()) as running:
        listed = [model.id async for model in running.openai.models.list()]
        one = await running.openai.models.retrieve("org/story")
        body = (await running.http.get("/v1/models")).json()
        same = (await running.http.get("/openai/v1/models")).json()
        unknown = await running.http.get("/v1/models/nobody")

    assert listed == ["org/story", "story", "identity"]
    assert one.id == "org/story"
    assert body == same
    assert body["models"] == ["org/story", "identity"]
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"


async def test_the_same_routes_are_under_openai_v1(start: Start) -> None:
    async with start() as running:
        reply = await running.post(
            "/openai/v1/chat/completions", {"model": "scripted", "messages": ASK}
        )

    assert reply.json()["choices"][0]["message"]["content"] == TEXT
