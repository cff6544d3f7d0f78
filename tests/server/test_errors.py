"""Both error tables know every kind, and say what clients look for."""

from __future__ import annotations

import json

import pytest

from naiad.core import errors
from naiad.core.errors import Kind
from naiad.server.http.errors import KSERVE, STATUS
from naiad.server.models import UnknownModel, UnknownVersion
from naiad.server.openai.errors import OPENAI, TABLE
from naiad.server.statistics import failure_reason


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_has_a_row_in_every_table(kind: Kind) -> None:
    assert 400 <= STATUS[kind] < 600
    assert 400 <= TABLE[kind].status < 600
    assert failure_reason(errors.WireError(kind.value, "x").to_error())


def test_clients_retry_only_what_a_retry_may_help() -> None:
    retried = {
        kind for kind in Kind if TABLE[kind].status in (408, 409, 429) or TABLE[kind].status > 499
    }

    assert retried == {Kind.OVERLOADED, Kind.UNAVAILABLE, Kind.TIMED_OUT, Kind.INTERNAL}


def test_an_unknown_model_is_wrong_for_triton_and_missing_for_openai() -> None:
    error = UnknownModel("Request for unknown model: 'x' is not found", model="x")

    assert (KSERVE.status(error), OPENAI.status(error)) == (400, 404)
    assert KSERVE.status(UnknownVersion("x")) == 404


def test_an_internal_error_shows_its_request_id_and_nothing_else() -> None:
    error = errors.InternalError("secret path")
    for style in (KSERVE, OPENAI):
        body = style.body(error, "id-9")
        assert b"secret" not in body
        assert b"id-9" in body


def test_the_bodies_have_each_protocols_shape() -> None:
    error = errors.InvalidRequest("n is 0", hint="send 1", param="n")

    assert json.loads(KSERVE.body(error, "")) == {"error": "n is 0; send 1"}
    assert json.loads(OPENAI.body(error, "")) == {
        "error": {
            "message": "n is 0; send 1",
            "type": "invalid_request_error",
            "param": "n",
            "code": None,
        }
    }
