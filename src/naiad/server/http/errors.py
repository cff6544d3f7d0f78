"""The one table from kinds of errors to KServe's HTTP statuses, as Triton gives them."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from naiad.core.errors import Kind, NaiadError
from naiad.server.http.exchange import ErrorStyle, WrongMethod
from naiad.server.http.intake import BodyTimedOut
from naiad.server.models import UnknownModel

STATUS: Mapping[Kind | type[NaiadError], int] = {
    Kind.INVALID: 400,
    Kind.NOT_FOUND: 404,
    Kind.TOO_LARGE: 413,  # Triton: 400
    Kind.OVERLOADED: 429,  # Triton: 503, which proxies take for an outage
    Kind.UNAVAILABLE: 503,
    Kind.UNSUPPORTED: 501,
    Kind.CANCELLED: 400,
    Kind.TIMED_OUT: 503,
    Kind.INTERNAL: 500,
    UnknownModel: 400,
    WrongMethod: 405,
    BodyTimedOut: 408,
}
"""By class where a class differs from its kind."""


def status(error: NaiadError) -> int:
    """The HTTP status of `error`."""
    return STATUS.get(type(error)) or STATUS[error.kind]


def body(error: NaiadError, request_id: str) -> bytes:
    """`{"error": ...}`; of an internal error only the request id."""
    text = (
        f"internal error; the server's log has more under request id {request_id}"
        if error.kind is Kind.INTERNAL
        else error.explain()
    )
    return msgspec.json.encode({"error": text})


KSERVE = ErrorStyle(status, body)
