"""The categories of failure a caller can be told about; knows nothing of gRPC, so that the core may raise them."""

# ruff: noqa: N818 (the names are those of the status codes)
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NOTHING: Mapping[str, str] = {}


class ServiceError(Exception):
    """A refusal with a stable reason. Raise one of the subclasses; the subclass is the category (one status code each).

    reason: UPPER_SNAKE, stable, what programs compare. message: one sentence for a person, free of secrets.
    metadata: facts for programs. fields: (field path, description) of each bad request field.
    violations: (type, subject, description) of each precondition that does not hold.
    retry_after: seconds after which the same call may succeed; None when waiting will not help; negative when a client
    must not retry by itself.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] = _NOTHING,
        fields: Sequence[tuple[str, str]] = (),
        violations: Sequence[tuple[str, str, str]] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message
        self.metadata = metadata
        self.fields = fields
        self.violations = violations
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class InvalidArgument(ServiceError):
    """The request is wrong whatever the state of the system."""


class OutOfRange(ServiceError):
    """A position past the end of what exists."""


class Unauthenticated(ServiceError):
    """Who calls could not be established."""


class PermissionDenied(ServiceError):
    """The caller is known and may not do this."""


class NotFound(ServiceError):
    """No such resource in the caller's tenant."""


class AlreadyExists(ServiceError):
    """What was to be created exists."""


class FailedPrecondition(ServiceError):
    """The system is not in the state this call needs; a retry changes nothing."""


class Aborted(ServiceError):
    """Another call was faster; read again, then retry."""


class ResourceExhausted(ServiceError):
    """A limit was reached. Without retry_after, clients are told not to retry."""


class Unavailable(ServiceError):
    """A part needed for the answer is away; the same call may succeed later."""


class DeadlineExceeded(ServiceError):
    """The time for the call is over."""


class Unimplemented(ServiceError):
    """No such method here."""


class Internal(ServiceError):
    """A defect of ours. Never put the cause into the message."""


class Cancelled(ServiceError):
    """The caller went away."""


class StoredAnswer(ServiceError):
    """An error answer given once before and now replayed verbatim.

    code: its gRPC status code as a number. status: the serialised google.rpc.Status.
    """

    def __init__(self, code: int, status: bytes) -> None:
        super().__init__("STORED_ANSWER", "replayed")
        self.code = code
        self.status = status


def invalid_field(field: str, description: str, reason: str = "FIELD_INVALID") -> InvalidArgument:
    """One bad request field: `field` is its path as in the proto, `description` says what it must be."""
    return InvalidArgument(reason, f"{field}: {description}", fields=((field, description),))
