"""`/v1/completions` and `/v1/chat/completions`: one JSON body in, one reply or an event stream out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

import msgspec

from naiad.core.generation import GenerateDelta, GenerateRequest
from naiad.server.admission import Admission
from naiad.server.http.exchange import Exchange, Send
from naiad.server.http.intake import Intake
from naiad.server.models import ModelTable
from naiad.server.openai.chunks import (
    DONE,
    Answer,
    Chat,
    ChunkWriter,
    Completion,
    Form,
    Usage,
    prompt_logprobs,
    whole_reply,
)
from naiad.server.openai.merge import merge
from naiad.server.openai.requests import (
    SamplingBody,
    read_chat,
    read_completion,
)


class OpenAIRoutes:
    """The two generating routes.

    Args:
        table: The models.
        admission: Who may run.
        intake: Reads the bodies.
        max_prompts: Most prompts in one completion request.
    """

    def __init__(
        self, table: ModelTable, admission: Admission, intake: Intake, max_prompts: int
    ) -> None:
        self._table = table
        self._admission = admission
        self._intake = intake
        self._max_prompts = max_prompts

    async def chat(self, exchange: Exchange) -> None:
        """`POST /v1/chat/completions`."""
        body, request = await self._intake.decode(
            exchange, lambda data: read_chat(data, exchange.request_id)
        )
        form = Chat(request.sampling.logprobs)
        await self._answer(exchange, body, form, [request])

    async def completions(self, exchange: Exchange) -> None:
        """`POST /v1/completions`."""
        body, requests = await self._intake.decode(
            exchange, lambda data: read_completion(data, exchange.request_id, self._max_prompts)
        )
        form = Completion(body.logprobs, has_prompt_logprobs=body.prompt_logprobs is not None)
        await self._answer(exchange, body, form, requests)

    async def _answer(
        self, exchange: Exchange, body: SamplingBody, form: Form, requests: list[GenerateRequest]
    ) -> None:
        exchange.model = body.model
        served = self._table.find(body.model)
        head = {
            "id": form.id_prefix + exchange.request_id,
            "created": int(time.time()),
            "model": body.model,
        }
        num_answers = requests[0].sampling.n
        usage = Usage(num_answers)
        async with self._admission.admit(exchange.disconnected):
            deltas = merge([served.generate(request) for request in requests], num_answers)
            try:
                if body.stream:
                    writer = ChunkWriter(
                        form,
                        head,
                        num_answers * len(requests),
                        include_usage=body.include_usage,
                    )
                    await _stream(exchange, deltas, writer, usage)
                    last = writer.usage(usage) + DONE if body.include_usage else DONE
                    await exchange.end_stream(last)
                else:
                    answers = [Answer(index) for index in range(num_answers * len(requests))]
                    await _collect(deltas, answers, usage)
                    reply = whole_reply(form, head, answers, usage)
                    if isinstance(form, Chat) and body.prompt_logprobs is not None:
                        reply["prompt_logprobs"] = prompt_logprobs(answers[0].prompt)
                    await exchange.reply(200, msgspec.json.encode(reply))
            finally:
                exchange.num_input_tokens = usage.num_prompt
                exchange.num_output_tokens = usage.num_output
                await deltas.aclose()


async def _stream(
    exchange: Exchange,
    deltas: AsyncGenerator[GenerateDelta, None],
    writer: ChunkWriter,
    usage: Usage,
) -> None:
    """Send every delta as it comes; the first one decides the status."""
    send: Send | None = None
    num_bytes = 0
    try:
        async for delta in deltas:
            usage.num_output += len(delta.token_ids)
            if delta.prompt is not None:
                usage.add_prompt(delta.index, delta.prompt)
            events = writer(delta)
            if not events:
                continue
            if send is None:
                send = await exchange.start_stream()
            num_bytes += len(events)
            await send({"type": "http.response.body", "body": events, "more_body": True})
        if send is None:
            await exchange.start_stream()
    finally:
        exchange.num_reply_bytes += num_bytes


async def _collect(
    deltas: AsyncGenerator[GenerateDelta, None], answers: list[Answer], usage: Usage
) -> None:
    async for delta in deltas:
        usage.num_output += len(delta.token_ids)
        if delta.prompt is not None:
            usage.add_prompt(delta.index, delta.prompt)
        answers[delta.index].add(delta)
