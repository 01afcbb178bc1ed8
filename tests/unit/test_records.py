"""What operators are told of a record when idempotency_svc answers something unusual."""

from __future__ import annotations

from typing import Any

import pytest

from controller_svc.core.records import RecordState
from controller_svc.records import Records
from orchestrator.idempotency.v1 import idempotency_service_pb2 as pb
from svckit.errors import Unavailable


class Stub:
    """Answers as an idempotency_svc that is newer, or that has lost a part of its Redis."""

    async def Get(self, request: pb.GetRequest, *, timeout: float) -> pb.GetResponse:
        response = pb.GetResponse()
        response.outcomes.add().record.MergeFrom(pb.GetOutcome.Record(state=99, epoch=2))  # type: ignore[arg-type]
        return response

    async def Release(self, request: pb.ReleaseRequest, *, timeout: float) -> pb.ReleaseResponse:
        return pb.ReleaseResponse(outcomes=[pb.ReleaseOutcome(result=pb.ReleaseOutcome.RESULT_AWAY)])


stub: Any = Stub()


async def test_a_state_of_a_newer_service_is_told_as_unknown() -> None:
    facts = await Records(stub, ttl=86400).facts(b"s" * 32)
    assert facts is not None
    assert (facts.state, facts.epoch) == (RecordState.UNSPECIFIED, 2)


async def test_a_record_out_of_reach_is_not_told_as_released() -> None:
    with pytest.raises(Unavailable) as caught:
        await Records(stub, ttl=86400).release_whoever(b"s" * 32)
    assert caught.value.reason == "IDEMPOTENCY_UNAVAILABLE"
