"""OpenAI's routes, read by OpenAI's own client."""

from __future__ import annotations


from tests.server.conftest import SCRIPT, Start

TEXT = "".join(SCRIPT)
ASK = [{"role": "user", "content": "Tell me a story"}]


async def test_a_chat_streams_role_first_then_text_then_reason(start: Start) -> None:
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


async def test_a_completion_streams(start: Start) -> None:
    async with start() as running:
        stream = await running.openai.completions.create(
            model="scripted", prompt="Tell me", stream=True
        )
        chunks = [chunk async for chunk in stream]

    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
