"""No JSON body, however strange, makes the server fail."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from naiad.backends.identity import IdentityModel
from naiad.backends.scripted import ScriptedLanguageModel
from naiad.core.generation import SamplingParams
from naiad.core.tensor import DataType
from naiad.core.text_fields import LISTS, SCALARS
from naiad.server.openai.requests import REFUSED, ChatBody, CompletionBody
from tests.server.asgi import call, make_app

BIG = st.sampled_from([2**31, 2**63, 2**64, 2**70, -(2**63) - 1, 1e308, -0.0])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | BIG,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
PLAUSIBLE = (
    st.integers(0, 3)
    | st.floats(0, 1)
    | st.booleans()
    | st.sampled_from(["", "a", "b"])
    | st.lists(st.sampled_from(["a", 1]), max_size=2)
)


def bodies(required: dict[str, Any], names: Any, values: Any = ANY) -> st.SearchStrategy[Any]:
    """`required` with a few fields by known names; most often well-formed, so that it goes deep."""
    some = st.dictionaries(st.sampled_from(sorted(names)), PLAUSIBLE | values, max_size=2)
    return st.builds(lambda extra, more: {**extra, **more}, st.fixed_dictionaries(required), some)


SAMPLING = set(SamplingParams.__struct_fields__) | set(REFUSED)
CONTENT = st.text(max_size=8) | st.just([{"type": "text", "text": "hello"}]) | ANY
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": CONTENT},
    optional={"name": ANY, "tool_calls": ANY},
)
CHAT = bodies(
    {"model": st.just("scripted"), "messages": st.lists(MESSAGE, min_size=1, max_size=2)},
    SAMPLING | set(ChatBody.__struct_fields__),
)
COMPLETION = bodies(
    {
        "model": st.just("scripted"),
        "prompt": st.sampled_from(["a", ["a", "b"], [1, 2], [[1], [2]]])
        | st.lists(st.integers(-1, 9) | BIG, max_size=3),
    },
    SAMPLING | set(CompletionBody.__struct_fields__),
)
GENERATE = bodies(
    {
        "text_input": st.sampled_from(["a", ["b"]]),
        "parameters": st.dictionaries(
            st.sampled_from(sorted(SAMPLING)), PLAUSIBLE | ANY, max_size=2
        ),
    },
    set(SCALARS) | set(LISTS) | SAMPLING,
)


def tensor(name: str, datatypes: Any) -> st.SearchStrategy[Any]:
    """An input of one element: three times in four it fits."""
    data = st.sampled_from([[1], [[1]], [0.5], ["a"], [True]]) | ANY
    shape = st.sampled_from([[1, 1], [1]]) | st.lists(st.integers(-1, 3) | BIG, max_size=3)
    return st.fixed_dictionaries(
        {"name": st.just(name), "shape": shape, "datatype": datatypes, "data": data},
        optional={"parameters": st.just({}) | ANY},
    )


ANY_TYPE = st.sampled_from([d.value for d in DataType])
INFER = bodies(
    {"inputs": st.tuples(tensor("INPUT0", st.just("FP32") | ANY_TYPE))},
    {"id", "parameters", "outputs", "model_name"},
    st.lists(st.fixed_dictionaries({"name": st.sampled_from(["OUTPUT0", "x"])}), max_size=2),
)
INFER_TEXT = bodies(
    {
        "inputs": st.tuples(
            tensor("text_input", st.just("BYTES")),
            st.sampled_from(sorted({**SCALARS, **LISTS})).flatmap(
                lambda name: tensor(name, st.just({**SCALARS, **LISTS}[name].value) | ANY_TYPE)
            ),
        )
    },
    {"id", "parameters", "outputs"},
    st.dictionaries(st.sampled_from(sorted(SAMPLING)), PLAUSIBLE, max_size=2),
)

CASES = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", COMPLETION),
    ("/v2/models/scripted/generate", GENERATE),
    ("/v2/models/scripted/generate_stream", GENERATE),
    ("/v2/models/scripted/infer", INFER_TEXT),
    ("/v2/models/identity/infer", INFER),
]
FAULTS = (500, 502)


@pytest.mark.parametrize(("path", "body"), CASES, ids=[path for path, _ in CASES])
def test_no_json_makes_the_server_fail(path: str, body: st.SearchStrategy[Any]) -> None:
    loop = asyncio.new_event_loop()
    app = make_app(
        ScriptedLanguageModel(["a", "b"], max_model_len=6),
        IdentityModel(),
    )

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(body | ANY)
    def check(value: Any) -> None:
        client = loop.run_until_complete(call(app, "POST", path, json.dumps(value).encode()))
        assert client.status not in FAULTS, client.text
        assert b"internal error" not in client.text

    try:
        check()
    finally:
        loop.close()


@given(data=st.binary(max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_bytes_make_the_server_fail(data: bytes) -> None:
    app = make_app(ScriptedLanguageModel(["a"]), IdentityModel())

    async def check() -> None:
        for path, _ in CASES:
            assert (await call(app, "POST", path, data)).status not in FAULTS

    asyncio.run(check())


@pytest.mark.parametrize("path", [path for path, _ in CASES])
@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"inputs":[', b'{"messages":['])
async def test_deep_nesting_is_refused(path: str, opening: bytes) -> None:
    app = make_app(ScriptedLanguageModel(["a"]), IdentityModel())

    assert (await call(app, "POST", path, opening * 50_000)).status == 400


@pytest.mark.parametrize("depth", [101, 400])
async def test_deep_values_of_known_fields_are_refused(depth: int) -> None:
    app = make_app(ScriptedLanguageModel(["a"]), IdentityModel())
    deep = b"[" * depth + b"]" * depth
    chat = b'{"model":"scripted","messages":[{"role":"user","content":"a","x":%s}]}' % deep
    infer = b'{"inputs":[{"name":"INPUT0","shape":[1,1],"datatype":"FP32","data":%s}]}' % deep

    assert (await call(app, "POST", "/v1/chat/completions", chat)).status == 400
    assert (await call(app, "POST", "/v2/models/identity/infer", infer)).status == 400
