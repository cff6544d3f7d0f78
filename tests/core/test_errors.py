"""Errors keep their facts wherever they go."""

from __future__ import annotations

import json
import pickle

import msgspec
import pytest

from naiad.core import errors
from naiad.core.errors import InternalError, Kind, NaiadError, QueueFull, WireError

EVERY = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, NaiadError) and value is not NaiadError
]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling(kind: type[NaiadError]) -> None:
    sent = kind("full", hint="slow down", limit=8)
    got = pickle.loads(pickle.dumps(sent))
    assert (type(got), str(got), got.hint, got.facts, got.kind) == (
        kind,
        "full",
        "slow down",
        {"limit": 8},
        kind.kind,
    )


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_an_error_survives_the_wire_as_its_kind(kind: type[NaiadError]) -> None:
    message = msgspec.msgpack.encode(WireError.of(kind("full", hint="slow down", limit=8)))
    got = msgspec.msgpack.decode(message, type=WireError).to_error()
    assert (got.kind, str(got), got.hint, got.facts) == (
        kind.kind,
        "full",
        "slow down",
        {"limit": 8},
    )


def test_any_other_exception_travels_as_our_fault() -> None:
    got = WireError.of(KeyError("x")).to_error()
    assert isinstance(got, InternalError)
    assert str(got) == "KeyError: 'x'"


def test_every_kind_has_an_error() -> None:
    assert {kind.kind for kind in EVERY} == set(Kind)


def test_explain_adds_the_hint() -> None:
    assert QueueFull("full").explain() == "full"
    assert QueueFull("full", hint="retry").explain() == "full; retry"


def test_facts_are_json() -> None:
    assert json.dumps(QueueFull("full", limit=8, retry_after_s=1.5).facts)
