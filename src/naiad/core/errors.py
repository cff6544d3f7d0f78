"""Every error Naiad raises on purpose, and nothing about how it is sent.

A kind is what a caller can act on; HTTP, gRPC and OpenAI codes are looked up once, in one table per
protocol at the edge (`naiad.server`), so this module imports no framework. Errors cross process
boundaries either pickled or as `WireError`, with their facts.
"""

from __future__ import annotations

import enum
from typing import Any, ClassVar

import msgspec


class Kind(enum.StrEnum):
    """What went wrong, in terms of what the caller should do next."""

    INVALID = "invalid"  # fix the request; a retry cannot help
    NOT_FOUND = "not_found"  # no such model, version or route
    TOO_LARGE = "too_large"  # a size limit was exceeded; send less
    OVERLOADED = "overloaded"  # a queue or rate limit was hit; retry after a pause
    UNAVAILABLE = "unavailable"  # loading, draining or restarting; retry soon or elsewhere
    UNSUPPORTED = "unsupported"  # well-formed, but Naiad does not do this
    CANCELLED = "cancelled"  # whoever asked went away
    TIMED_OUT = "timed_out"  # a deadline passed
    INTERNAL = "internal"  # our fault; the client gets the id, the log gets the rest


class NaiadError(Exception):
    """Base of every deliberate error. Except for INTERNAL, `str(e)` may be shown to the client.

    Args:
        message: What happened, with the numbers.
        hint: What to do about it; empty when the message says it all.
        facts: Values a program may read (`limit`, `retry_after_s`); must be JSON-serialisable.
    """

    kind: ClassVar[Kind] = Kind.INTERNAL

    def __init__(self, message: str, *, hint: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.hint = hint
        self.facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would drop everything but the message.
        return _rebuild, (type(self), str(self), self.hint, self.facts)

    def explain(self) -> str:
        """The message and, where there is one, the hint: the text a person reads."""
        return f"{self}; {self.hint}" if self.hint else str(self)


def _rebuild(cls: type[NaiadError], message: str, hint: str, facts: dict[str, Any]) -> NaiadError:
    return cls(message, hint=hint, **facts)


class InvalidRequest(NaiadError):
    """The request can never succeed as sent."""

    kind = Kind.INVALID


class InvalidModel(NaiadError):
    """A checkpoint or model folder that cannot be loaded as it is; the message names the file."""

    kind = Kind.INVALID


class InvalidSettings(NaiadError):
    """A flag, file or environment value that is unknown or out of range; the message names it."""

    kind = Kind.INVALID


class NotFound(NaiadError):
    """No such model, version or route."""

    kind = Kind.NOT_FOUND


class TooLarge(NaiadError):
    """A size limit was exceeded. Facts: `limit`."""

    kind = Kind.TOO_LARGE


class QueueFull(NaiadError):
    """A bounded queue is at its limit. Facts: `limit`, `retry_after_s`."""

    kind = Kind.OVERLOADED


class Unavailable(NaiadError):
    """The model is loading, draining or restarting, or its engine died. Facts: `retry_after_s`."""

    kind = Kind.UNAVAILABLE


class Unsupported(NaiadError):
    """Understood, and refused: Naiad does not do this."""

    kind = Kind.UNSUPPORTED


class Cancelled(NaiadError):
    """The request was cancelled by its sender or by model control."""

    kind = Kind.CANCELLED


class TimedOut(NaiadError):
    """A deadline passed. Facts: `timeout_s`."""

    kind = Kind.TIMED_OUT


class InternalError(NaiadError):
    """Our fault. The text is for the log; the edge answers with a request id instead."""

    kind = Kind.INTERNAL


_BY_KIND: dict[Kind, type[NaiadError]] = {
    Kind.INVALID: InvalidRequest,
    Kind.NOT_FOUND: NotFound,
    Kind.TOO_LARGE: TooLarge,
    Kind.OVERLOADED: QueueFull,
    Kind.UNAVAILABLE: Unavailable,
    Kind.UNSUPPORTED: Unsupported,
    Kind.CANCELLED: Cancelled,
    Kind.TIMED_OUT: TimedOut,
    Kind.INTERNAL: InternalError,
}


class WireError(msgspec.Struct, frozen=True):
    """An error as it travels between processes."""

    kind: str
    message: str
    hint: str = ""
    facts: dict[str, Any] = {}

    @staticmethod
    def of(error: BaseException) -> WireError:
        """Describe `error`; anything that is not a `NaiadError` travels as INTERNAL."""
        if isinstance(error, NaiadError):
            return WireError(error.kind.value, str(error), error.hint, error.facts)
        return WireError(Kind.INTERNAL.value, f"{type(error).__name__}: {error}")

    def to_error(self) -> NaiadError:
        """The error again, as the class that its kind names."""
        return _BY_KIND[Kind(self.kind)](self.message, hint=self.hint, **self.facts)
