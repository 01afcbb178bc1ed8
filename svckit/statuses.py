"""The one table from error category to gRPC status, and the google.rpc.Status each error becomes."""

from __future__ import annotations

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from svckit import errors

DOMAIN = "orchestrator"

CODES: dict[type[errors.ServiceError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.Internal: grpc.StatusCode.INTERNAL,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
}

BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

# The only error answers that may be stored and replayed: INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS,
# FAILED_PRECONDITION, OUT_OF_RANGE. All others say something about the moment, not about the request.
STORED_CODES: frozenset[int] = frozenset({3, 5, 6, 9, 11})

# Details travel in trailers, of which clients accept 8 KiB in all: what is sent stays well below.
_MESSAGE_CHARS = 400
_VALUE_CHARS = 200
_DETAILS = 8


def code_of(error: errors.ServiceError) -> grpc.StatusCode:
    """The status code of an error's category; a subclass of a category has its category's code."""
    if isinstance(error, errors.StoredAnswer):
        return BY_NUMBER.get(error.code, grpc.StatusCode.UNKNOWN)
    for kind in type(error).__mro__:
        code = CODES.get(kind)
        if code is not None:
            return code
    return grpc.StatusCode.INTERNAL


def status_of(error: errors.ServiceError) -> Status:
    """The error as google.rpc.Status: ErrorInfo always; BadRequest, PreconditionFailure, RetryInfo where they apply.

    A StoredAnswer comes back exactly as it was stored. Long texts and lists are cut to fit into trailers.
    """
    if isinstance(error, errors.StoredAnswer):
        return Status.FromString(error.status)
    status = Status(code=code_of(error).value[0], message=_text(error.message, _MESSAGE_CHARS))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in list(error.metadata.items())[:_DETAILS]:
        info.metadata[_text(key, 64)] = _text(value, _VALUE_CHARS)
    status.details.add().Pack(info)
    if error.fields:
        bad = error_details_pb2.BadRequest()
        for field, description in error.fields[:_DETAILS]:
            bad.field_violations.add(field=_text(field, _VALUE_CHARS), description=_text(description, _VALUE_CHARS))
        status.details.add().Pack(bad)
    if error.violations:
        unmet = error_details_pb2.PreconditionFailure()
        for kind, subject, description in error.violations[:_DETAILS]:
            unmet.violations.add(
                type=_text(kind, 64), subject=_text(subject, _VALUE_CHARS), description=_text(description, _VALUE_CHARS)
            )
        status.details.add().Pack(unmet)
    if error.retry_after is not None and error.retry_after >= 0:
        delay = Duration()
        delay.FromMilliseconds(int(error.retry_after * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _text(text: str, limit: int) -> str:
    """At most `limit` characters, and nothing protobuf would refuse to encode."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text.encode("utf-8", "replace").decode("utf-8")
