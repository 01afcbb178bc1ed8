"""Errors and the one table that makes statuses of them."""

from __future__ import annotations

import inspect
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from svckit import errors, statuses


def details(error: errors.ServiceError) -> dict[str, Any]:
    status = statuses.status_of(error)
    kinds = (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.RetryInfo,
    )
    found: dict[str, Any] = {}
    for detail in status.details:
        for kind in kinds:
            if detail.Is(kind.DESCRIPTOR):
                found[kind.__name__] = kind.FromString(detail.value)
    assert len(found) == len(status.details)
    return found


def categories() -> list[type[errors.ServiceError]]:
    return [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.ServiceError) and kind not in (errors.ServiceError, errors.StoredAnswer)
    ]


def test_every_category_has_a_code_of_its_own() -> None:
    assert set(statuses.CODES) == set(categories())
    assert len(set(statuses.CODES.values())) == len(categories())
    for kind, code in statuses.CODES.items():
        assert kind.__name__.upper() == code.name.replace("_", "")


@pytest.mark.parametrize("kind", categories())
def test_every_error_carries_error_info(kind: type[errors.ServiceError]) -> None:
    error = kind("SOME_REASON", "some message", metadata={"a": "b"})
    status = statuses.status_of(error)
    assert (status.code, status.message) == (statuses.CODES[kind].value[0], "some message")
    found = details(error)
    assert list(found) == ["ErrorInfo"]
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == ("SOME_REASON", "orchestrator")
    assert dict(found["ErrorInfo"].metadata) == {"a": "b"}


def test_a_subclass_of_a_category_has_its_code() -> None:
    class SessionGone(errors.NotFound):
        pass

    assert statuses.code_of(SessionGone("X", "x")) is grpc.StatusCode.NOT_FOUND
    assert statuses.code_of(errors.ServiceError("X", "x")) is grpc.StatusCode.INTERNAL


def test_details_where_they_apply() -> None:
    found = details(errors.invalid_field("metadata.a", "must be shorter"))
    assert found["ErrorInfo"].reason == "FIELD_INVALID"
    (violation,) = found["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("metadata.a", "must be shorter")

    found = details(errors.FailedPrecondition("X", "x", violations=[("STATE", "session/1", "must be ACTIVE")]))
    (unmet,) = found["PreconditionFailure"].violations
    assert (unmet.type, unmet.subject, unmet.description) == ("STATE", "session/1", "must be ACTIVE")

    found = details(errors.Aborted("X", "x", retry_after=1.25))
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 1250


def test_statuses_fit_into_trailers_whatever_is_in_them() -> None:
    long = "é" * 10000
    error = errors.InvalidArgument(
        "X",
        long,
        metadata={f"{number}{long}": long for number in range(100)},
        fields=[(long, long)] * 100,
        violations=[(long, long, long)] * 100,
    )
    assert len(statuses.status_of(error).SerializeToString()) < 20000
    plain = errors.InvalidArgument("X", "a" * 10000, metadata={"a": "b" * 10000}, fields=[("f" * 900, "d" * 900)] * 9)
    assert len(statuses.status_of(plain).SerializeToString()) < 5000
    assert statuses.status_of(errors.NotFound("X", "lone \ud800 surrogate")).message == "lone ? surrogate"


def test_stored_answers_come_back_as_they_were() -> None:
    original = statuses.status_of(errors.NotFound("SESSION_NOT_FOUND", "no such session")).SerializeToString()
    answer = errors.StoredAnswer(5, original)
    assert statuses.status_of(answer).SerializeToString() == original
    assert statuses.code_of(answer) is grpc.StatusCode.NOT_FOUND


def test_stored_codes() -> None:
    names = {statuses.BY_NUMBER[number].name for number in statuses.STORED_CODES}
    assert names == {"INVALID_ARGUMENT", "OUT_OF_RANGE", "ALREADY_EXISTS", "NOT_FOUND", "FAILED_PRECONDITION"}
