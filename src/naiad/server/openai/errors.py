"""The one table from kinds of errors to OpenAI's statuses, types and codes."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from naiad.core.errors import Kind, NaiadError
from naiad.server.http.exchange import ErrorStyle, WrongMethod
from naiad.server.http.intake import BodyTimedOut
from naiad.server.models import UnknownModel


class Row(msgspec.Struct, frozen=True):
    """One kind in OpenAI's words."""

    status: int
    type: str
    code: str | None = None


# OpenAI's clients retry 408, 409, 429 and every 5xx: only what a retry may help gets those.
TABLE: Mapping[Kind | type[NaiadError], Row] = {
    Kind.INVALID: Row(400, "invalid_request_error"),
    Kind.NOT_FOUND: Row(404, "invalid_request_error", "not_found"),
    Kind.TOO_LARGE: Row(413, "invalid_request_error", "request_too_large"),
    Kind.OVERLOADED: Row(429, "rate_limit_error", "rate_limit_exceeded"),
    Kind.UNAVAILABLE: Row(503, "server_error", "unavailable"),
    Kind.UNSUPPORTED: Row(400, "invalid_request_error", "unsupported"),
    Kind.CANCELLED: Row(499, "invalid_request_error", "cancelled"),
    Kind.TIMED_OUT: Row(504, "server_error", "timed_out"),
    Kind.INTERNAL: Row(500, "server_error", "internal_error"),
    UnknownModel: Row(404, "invalid_request_error", "model_not_found"),
    WrongMethod: Row(405, "invalid_request_error"),
    BodyTimedOut: Row(408, "invalid_request_error", "body_timed_out"),
}
"""By class where a class differs from its kind."""


class _ErrorObject(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


def _row(error: NaiadError) -> Row:
    return TABLE.get(type(error)) or TABLE[error.kind]


def status(error: NaiadError) -> int:
    """The HTTP status of `error`."""
    return _row(error).status


def body(error: NaiadError, request_id: str) -> bytes:
    """`{"error": {message, type, param, code}}`; of an internal error only the request id."""
    row = _row(error)
    if error.kind is Kind.INTERNAL:
        text = f"internal error; the server's log has more under request id {request_id}"
    elif isinstance(error, UnknownModel):
        text = f"The model `{error.facts.get('model')}` does not exist"
    else:
        text = error.explain()
    param = error.facts.get("param")
    found = _ErrorObject(text, row.type, param if isinstance(param, str) else None, row.code)
    return msgspec.json.encode({"error": found})


OPENAI = ErrorStyle(status, body, after_event=b"data: [DONE]\n\n")
