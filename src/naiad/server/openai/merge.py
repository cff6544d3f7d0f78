"""Several prompts of one completion request, answered side by side as one stream of deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import msgspec

from naiad.core.generation import GenerateDelta

_QUEUE_DELTAS = 64
"""Room between the prompts and a client that does not read; then the prompts wait too."""


def merge(
    streams: Sequence[AsyncGenerator[GenerateDelta, None]], answers_per_prompt: int
) -> AsyncGenerator[GenerateDelta, None]:
    """The deltas of all streams as they come; answer i of prompt p is index p * answers + i.

    The first error of any stream ends them all. Closing the result closes every stream.
    """
    if len(streams) == 1:
        return streams[0]
    return _merge(streams, answers_per_prompt)


async def _merge(
    streams: Sequence[AsyncGenerator[GenerateDelta, None]], answers_per_prompt: int
) -> AsyncGenerator[GenerateDelta, None]:
    queue: asyncio.Queue[GenerateDelta | Exception | None] = asyncio.Queue(_QUEUE_DELTAS)

    async def pump(stream: AsyncGenerator[GenerateDelta, None], first_index: int) -> None:
        try:
            async for delta in stream:
                index = first_index + delta.index
                await queue.put(msgspec.structs.replace(delta, index=index))
        except Exception as error:  # noqa: BLE001 - raised again where the deltas are read
            await queue.put(error)
        else:
            await queue.put(None)
        finally:
            await stream.aclose()

    pumps = []
    try:
        for number, stream in enumerate(streams):
            pumps.append(asyncio.create_task(pump(stream, number * answers_per_prompt)))
            await asyncio.sleep(0)  # reading a prompt takes a while: other requests go in between
        num_open = len(pumps)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
