"""No request, however strange its values, fails inside: every message to the engine can be sent."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from naiad.backends.llm.model import load_language_model
from naiad.engine.config import EngineConfig
from tests.backends.llm import fake_engine
from tests.backends.llm.conftest import write_text_files
from tests.server.asgi import call, make_app
from tests.server.test_fuzz import ANY, CHAT, COMPLETION, FAULTS, GENERATE

HUGE = [2**31, 2**53, 2**63, 2**64, 2**70, -(2**31) - 1, -(2**63) - 1, 1e308, -1e308]
NUMBERS = """
seed priority top_k n logprobs top_logprobs prompt_logprobs min_tokens max_tokens temperature top_p
min_p presence_penalty frequency_penalty repetition_penalty end_id pad_id num_return_sequences
""".split()
GENERATE_PATH = "/v2/models/tiny/generate"

Post = Callable[[str, Any], int]


@pytest.fixture
def post(tmp_path: Path) -> Iterator[Post]:
    """Sends a body to a server before an engine process, and checks how it ends."""
    folder = write_text_files(tmp_path / "tiny")
    with asyncio.Runner() as runner:
        names = ["tiny", "scripted"]
        loading = load_language_model(folder, EngineConfig(), names, command=fake_engine.COMMAND)
        model = runner.run(loading)
        app = make_app(model)

        def send(path: str, body: Any) -> int:
            client = runner.run(call(app, "POST", path, json.dumps(body).encode()))
            assert client.status not in FAULTS, client.text
            assert b"internal error" not in client.text
            assert model.client.num_in_flight == 0
            return client.status

        yield send
        runner.run(model.close())


def test_no_number_is_too_large_to_be_answered_or_refused(post: Post) -> None:
    completion = {"model": "tiny", "prompt": "a", "max_tokens": 2}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    statuses = set()
    for name, value in itertools.product(NUMBERS, HUGE):
        statuses.add(post("/v1/completions", {**completion, name: value}))
        statuses.add(post("/v1/chat/completions", {**chat, "logprobs": True, name: value}))
        statuses.add(post(GENERATE_PATH, {"text_input": "a", "max_tokens": 2, name: value}))
    for value in HUGE:
        for lists in ({"stop_token_ids": [value]}, {"logit_bias": {str(value): 1}}):
            statuses.add(post("/v1/completions", {**completion, **lists}))
        post("/v1/completions", {**completion, "prompt": [value]})

    assert statuses == {200, 400, 501}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/chat/completions", CHAT),
        (GENERATE_PATH, GENERATE),
    ],
    ids=["completion", "chat", "generate"],
)
def test_no_json_fails_on_the_way_to_the_engine(
    path: str, body: st.SearchStrategy[Any], post: Post
) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(body | ANY)
    def check(value: Any) -> None:
        post(path, {"max_tokens": 2, **value} if isinstance(value, dict) else value)

    check()
