"""What a request may ask of one engine: nothing that would fail, or slow down, everybody's steps.

Pure. Whether there is room for the request is the scheduler's question, not this module's.
"""

from __future__ import annotations

from naiad.core.errors import InvalidRequest
from naiad.engine.messages import EngineRequest

MAX_PROMPT_LOGPROBS = 2**18
"""Log probabilities of one prompt, which travel in one message: about 4 MB and 0.2 s of the client."""
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 256
"""End of sequence included. Entries of both go into every step of every answer."""


def check(request: EngineRequest, vocab_size: int) -> None:
    """Raise `InvalidRequest`, with the numbers and the remedy, unless `request` may be queued."""
    _check_ids(request, vocab_size)
    sampling, num_prompt = request.sampling, len(request.prompt_token_ids)
    for name, num_entries, limit in (
        ("logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIAS),
        ("stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_TOKEN_IDS),
    ):
        if num_entries > limit:
            raise InvalidRequest(
                f"{name} has {num_entries} entries, the limit is {limit}",
                hint="send fewer",
                limit=limit,
            )
    if sampling.prompt_logprobs is None:
        return
    num_values = num_prompt * (sampling.prompt_logprobs + 1)
    if num_values > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"{sampling.prompt_logprobs} prompt_logprobs for {num_prompt} prompt tokens are "
            f"{num_values} values, the limit is {MAX_PROMPT_LOGPROBS}",
            hint="lower prompt_logprobs or shorten the prompt",
            limit=MAX_PROMPT_LOGPROBS,
        )


def _check_ids(request: EngineRequest, vocab_size: int) -> None:
    """Ids outside the vocabulary: on the device they would fail the step."""
    named = {
        "the prompt": request.prompt_token_ids,
        "logit_bias": request.sampling.logit_bias,
        "stop_token_ids": request.sampling.stop_token_ids,
    }
    for name, ids in named.items():
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            wrong = next(one for one in ids if not 0 <= one < vocab_size)
            raise InvalidRequest(
                f"{name} has token id {wrong}, outside the vocabulary of {vocab_size}",
                hint=f"use ids from 0 to {vocab_size - 1}",
            )
