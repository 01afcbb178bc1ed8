"""IdempotencyService: checks the items' form, asks the cache, and says what it answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from idempotency_svc import cache
from idempotency_svc.waiters import Waiters
from orchestrator.idempotency.v1 import idempotency_service_pb2 as pb
from svckit.errors import InvalidArgument, invalid_field

if TYPE_CHECKING:
    from collections.abc import Iterable

    from svckit.interceptors import Call

_LARGEST_CODE = 16
_LONGEST_WAIT_MILLIS = 30_000
_NO_NONCE = bytes(cache.NONCE_BYTES)


class IdempotencyServicer:
    """The RPCs over one Cache. Items are answered in order, each by itself; a malformed one refuses the request."""

    def __init__(self, records: cache.Cache) -> None:
        self._records = records
        self._waiters = Waiters(records)

    async def Claim(self, request: pb.ClaimRequest, call: Call) -> bytes:
        """Takes keys, or says why not."""
        _check_count(len(request.items))
        items = [_claim_item(f"items[{index}]", item) for index, item in enumerate(request.items)]
        return b"".join([_claim_answer(outcome) for outcome in await self._records.claim(items)])

    async def Await(self, request: pb.AwaitRequest, call: Call) -> bytes:
        """Takes a key once its owner has gone, or says why not."""
        item = _claim_item("item", request.item)
        if not 1 <= request.wait_millis <= _LONGEST_WAIT_MILLIS:
            raise _invalid("wait_millis", request.wait_millis, f"must be 1 to {_LONGEST_WAIT_MILLIS}")
        with call.waiting():
            outcome = await self._waiters.wait(item, request.wait_millis / 1000)
        return _claim_answer(outcome)  # a ClaimResponse of one outcome is an AwaitResponse

    async def Complete(self, request: pb.CompleteRequest, call: Call) -> bytes:
        """Stores answers."""
        _check_count(len(request.items))
        items = []
        for index, item in enumerate(request.items):
            path = f"items[{index}]"
            scope, nonce, code, answer, ttl_millis = item.scope, item.nonce, item.code, item.answer, item.ttl_millis
            _check_owner(path, scope, nonce)
            if not 0 <= code <= _LARGEST_CODE:
                raise _invalid(f"{path}.code", code, f"must be 0 to {_LARGEST_CODE}")
            if len(answer) > cache.LARGEST_ANSWER:
                raise _invalid(f"{path}.answer", answer, f"must be at most {cache.LARGEST_ANSWER} bytes")
            _check_ttl(path, ttl_millis)
            durable, timeline, answer_omitted = item.durable, item.timeline, item.answer_omitted
            if timeline and not durable:
                raise _invalid(f"{path}.timeline", timeline, "must be 0 unless durable")
            if answer_omitted and (answer or not durable):
                raise _invalid(f"{path}.answer_omitted", True, "must be durable and without an answer")
            fingerprints = _fingerprints(f"{path}.fingerprints", item.fingerprints)
            items.append(
                cache.CompleteItem(
                    scope, fingerprints, nonce, code, answer, ttl_millis, durable, timeline, answer_omitted
                )
            )
        return b"".join([_COMPLETED[result] for result in await self._records.complete(items)])

    async def Release(self, request: pb.ReleaseRequest, call: Call) -> bytes:
        """Gives keys back."""
        _check_count(len(request.items))
        items = []
        for index, item in enumerate(request.items):
            scope, nonce = item.scope, item.nonce or _NO_NONCE * item.forced
            _check_owner(f"items[{index}]", scope, nonce)
            items.append(cache.ReleaseItem(scope, nonce, item.forced))
        return b"".join([_RELEASED[result] for result in await self._records.release(items)])

    async def Extend(self, request: pb.ExtendRequest, call: Call) -> bytes:
        """Gives owners more time."""
        _check_count(len(request.items))
        items = []
        for index, item in enumerate(request.items):
            path, scope, nonce, lease_millis = f"items[{index}]", item.scope, item.nonce, item.lease_millis
            _check_owner(path, scope, nonce)
            _check_lease(path, lease_millis)
            items.append(cache.ExtendItem(scope, nonce, lease_millis))
        return b"".join([_EXTENDED[result] for result in await self._records.extend(items)])

    async def Get(self, request: pb.GetRequest, call: Call) -> bytes:
        """Tells of records."""
        _check_count(len(request.items))
        for index, item in enumerate(request.items):
            _check_owner(f"items[{index}]", item.scope, _NO_NONCE)
        response = pb.GetResponse()
        for record in await self._records.get([cache.GetItem(item.scope) for item in request.items]):
            outcome = response.outcomes.add()
            if record is not None:
                outcome.record.MergeFrom(_record(record))
        return response.SerializeToString()


def _check_count(count: int) -> None:
    if not 1 <= count <= cache.LARGEST_BATCH:
        raise _invalid("items", count, f"must be 1 to {cache.LARGEST_BATCH}")


def _claim_item(path: str, item: pb.ClaimItem) -> cache.ClaimItem:
    scope, nonce, lease_millis, ttl_millis = item.scope, item.nonce, item.lease_millis, item.ttl_millis
    _check_owner(path, scope, nonce)
    _check_lease(path, lease_millis)
    _check_ttl(path, ttl_millis)
    fingerprints = _fingerprints(f"{path}.fingerprints", item.fingerprints)
    return cache.ClaimItem(scope, fingerprints, nonce, lease_millis, ttl_millis)


def _check_owner(path: str, scope: bytes, nonce: bytes) -> None:
    if len(scope) != cache.SCOPE_BYTES:
        raise _invalid(f"{path}.scope", scope, f"must be {cache.SCOPE_BYTES} bytes")
    if len(nonce) != cache.NONCE_BYTES:
        raise _invalid(f"{path}.nonce", nonce, f"must be {cache.NONCE_BYTES} bytes")


def _check_lease(path: str, lease_millis: int) -> None:
    if not 1 <= lease_millis <= cache.LONGEST_LEASE_MILLIS:
        raise _invalid(f"{path}.lease_millis", lease_millis, f"must be 1 to {cache.LONGEST_LEASE_MILLIS}")


def _check_ttl(path: str, ttl_millis: int) -> None:
    if not 1 <= ttl_millis <= cache.LONGEST_TTL_MILLIS:
        raise _invalid(f"{path}.ttl_millis", ttl_millis, f"must be 1 to {cache.LONGEST_TTL_MILLIS}")


def _fingerprints(path: str, given: Iterable[pb.Fingerprint]) -> cache.Fingerprints:
    fingerprints = tuple([(one.kind, one.digest) for one in given])
    if not 1 <= len(fingerprints) <= cache.MOST_KINDS:
        raise _invalid(path, fingerprints, f"must be 1 to {cache.MOST_KINDS}")
    for place, (kind, digest) in enumerate(fingerprints):
        if not 1 <= kind <= cache.LARGEST_KIND:
            raise _invalid(f"{path}[{place}].kind", kind, f"must be 1 to {cache.LARGEST_KIND}")
        if len(digest) != cache.DIGEST_BYTES:
            raise _invalid(f"{path}[{place}].digest", digest, f"must be {cache.DIGEST_BYTES} bytes")
    if len(fingerprints) > 1 and len({kind for kind, _ in fingerprints}) < len(fingerprints):
        raise _invalid(path, fingerprints, "must be of different kinds")
    return fingerprints


def _invalid(path: str, value: object, description: str) -> InvalidArgument:
    return invalid_field(path, description, "FIELD_INVALID" if value else "FIELD_REQUIRED")


# An answer is the concatenation of answers of one outcome each: protobuf reads that as one message with all of them.


def _record(record: cache.Record) -> pb.GetOutcome.Record:
    return pb.GetOutcome.Record(
        state=pb.GetOutcome.Record.State.Value(f"STATE_{record.state.name}"),
        epoch=record.epoch,
        lease_left_millis=record.lease_left_millis,
        ttl_left_millis=record.ttl_left_millis,
        code=record.code,
        durable=record.durable,
        timeline=record.timeline,
        answer_omitted=record.answer_omitted,
        answer_bytes=record.answer_bytes,
        fingerprint_kinds=record.kinds,
    )


def _claim_answer(outcome: cache.ClaimOutcome) -> bytes:
    match outcome:
        case cache.Acquired(1):
            return _FIRST
        case cache.Acquired(epoch):
            answer = pb.ClaimOutcome(acquired=pb.ClaimOutcome.Acquired(epoch=epoch))
        case cache.Replay(code, stored, durable, timeline, answer_omitted):
            replay = pb.ClaimOutcome.Replay(
                code=code, answer=stored, durable=durable, timeline=timeline, answer_omitted=answer_omitted
            )
            answer = pb.ClaimOutcome(replay=replay)
        case cache.Busy(lease_left_millis):
            answer = pb.ClaimOutcome(busy=pb.ClaimOutcome.Busy(lease_left_millis=lease_left_millis))
        case cache.Takeover(epoch):
            answer = pb.ClaimOutcome(takeover=pb.ClaimOutcome.Takeover(epoch=epoch))
        case cache.Mismatch(durable):
            answer = pb.ClaimOutcome(mismatch=pb.ClaimOutcome.Mismatch(durable=durable))
        case cache.Away():
            answer = pb.ClaimOutcome(away=pb.ClaimOutcome.Away())
    return pb.ClaimResponse(outcomes=[answer]).SerializeToString()


_FIRST = pb.ClaimResponse(outcomes=[pb.ClaimOutcome(acquired=pb.ClaimOutcome.Acquired(epoch=1))]).SerializeToString()
_COMPLETED = {
    result: pb.CompleteResponse(
        outcomes=[pb.CompleteOutcome(result=pb.CompleteOutcome.Result.Value(f"RESULT_{result.name}"))]
    ).SerializeToString()
    for result in cache.Completed
}
_RELEASED = {
    result: pb.ReleaseResponse(
        outcomes=[pb.ReleaseOutcome(result=pb.ReleaseOutcome.Result.Value(f"RESULT_{result.name}"))]
    ).SerializeToString()
    for result in cache.Released
}
_EXTENDED = {
    result: pb.ExtendResponse(
        outcomes=[pb.ExtendOutcome(result=pb.ExtendOutcome.Result.Value(f"RESULT_{result.name}"))]
    ).SerializeToString()
    for result in cache.Extended
}
