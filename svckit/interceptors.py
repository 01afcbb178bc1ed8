"""THE way of a call into a service: telemetry, errors, admission, auth, parse, servicer."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from random import random, uniform
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError, Message

from svckit import errors, statuses, telemetry
from svckit.auth import NOBODY
from svckit.options import Policy, WriteMode, policies

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from google.protobuf.descriptor import ServiceDescriptor
    from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

    from svckit.auth import Principal

    Context = grpc.aio.ServicerContext[Any, Any]
    Step = Callable[["Call"], Awaitable[Any]]
    Replay = Callable[["Call"], Awaitable[bytes] | None]

LAYERS = ("telemetry", "errors", "admission", "auth", "parse", "servicer")
"""The order in which a call meets them, outermost first; Chain composes by this tuple."""

MAX_SECONDS = 30.0
"""A unary call without a deadline gets this long; a longer deadline is cut to it."""

FOREIGN_REQUEST_BYTES = 65536
"""Largest request of the services we mount but did not define: health, reflection, channelz."""

FOREIGN_STREAMS = 256
"""How many of their streams may be open. Counted apart: some are open to strangers, who must not use up MAX_WAITING."""

log = structlog.get_logger()


class Verifier(Protocol):
    """What the chain needs of a token verifier."""

    def cached(self, token: str) -> Principal | None:
        """The principal of a token that was verified before and is still good; never waits."""
        ...

    async def verify(self, token: str) -> Principal:
        """The principal of any token. Raises Unauthenticated, PermissionDenied or Unavailable."""
        ...


@dataclass(slots=True)
class Admission:
    """How many calls are worked on and how many wait, against their limits."""

    max_in_flight: int
    max_waiting: int
    in_flight: int = 0
    waiting: int = 0

    def refuse(self, reason: str, message: str) -> NoReturn:
        """Send a caller away for a moment; of random length, so that not all come back at once."""
        raise errors.ResourceExhausted(reason, message, retry_after=uniform(0.1, 1.0))  # noqa: S311


@dataclass(slots=True)
class Call:
    """One call on its way. The servicer gets it beside the request.

    raw: the request's bytes as received. metadata: (key, value) pairs as received. deadline: in the event loop's
    time, infinite for a stream without one.
    """

    policy: Policy
    raw: bytes
    metadata: tuple[tuple[str, str | bytes], ...]
    deadline: float
    trace: telemetry.Trace
    principal: Principal
    admission: Admission
    authorization: str | None = None
    context: Any = None
    request: Any = None
    trailers: tuple[tuple[str, str | bytes], ...] = ()
    failure: errors.ServiceError | None = None

    @property
    def request_id(self) -> str:
        """Names this call in logs: the id of its span."""
        return self.trace.span_id

    def values(self, name: str) -> list[str]:
        """All values of one metadata key (in lower case), in order."""
        return [value for key, value in self.metadata if key == name and isinstance(value, str)]

    def remaining(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - asyncio.get_running_loop().time()

    def trailer(self, key: str, value: str | bytes) -> None:
        """Add trailing metadata to the answer, be it OK or an error."""
        self.trailers += ((key, value),)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While inside, the call counts as waiting, not as working. Raises ResourceExhausted TOO_MANY_WAITING."""
        admission = self.admission
        if admission.waiting >= admission.max_waiting:
            admission.refuse("TOO_MANY_WAITING", "too many calls are waiting here")
        admission.waiting += 1
        admission.in_flight -= 1
        try:
            yield
        finally:
            admission.in_flight += 1
            admission.waiting -= 1


class Chain(grpc.GenericRpcHandler):
    """The layers of LAYERS around every method of a server, composed once per method.

    It is the only handler a server gets and holds the table of all methods itself: what is neither registered nor
    mounted here is not served, so no method and no stream can reach a servicer beside it. For gRPC it is a generic
    handler rather than an interceptor, which would cost two more coroutines a call; and methods are not registered with
    grpc.aio by name either, which would make it wait for the next call of each method anew at every call.
    """

    def __init__(self, verifier: Verifier, *, max_in_flight: int, max_waiting: int, log_ok_sample: float = 0.0) -> None:
        self.admission = Admission(max_in_flight, max_waiting)
        self.largest_request = FOREIGN_REQUEST_BYTES
        self._foreign_admission = Admission(0, FOREIGN_STREAMS)
        self._verifier = verifier
        self._log_ok_sample = log_ok_sample
        self._streams: dict[int, tuple[Call, asyncio.Task[Any]]] = {}
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._unknown = self._compose_unknown()
        telemetry.IN_FLIGHT.set_function(lambda: self.admission.in_flight)
        telemetry.WAITING.set_function(lambda: self.admission.waiting)

    # --- what is served -----------------------------------------------------------------------------------------------

    def register(
        self, service: ServiceDescriptor, servicer: object, default_max_bytes: int, replay: Replay | None = None
    ) -> None:
        """Serve all methods of one of our services by `servicer`, under the policies in its descriptor.

        A servicer's method is `async def Method(self, request, call: Call)` and returns a message or its bytes; of a
        server-streaming method it is an async generator of those. `replay` is asked first about every call of a guarded
        method: what it answers goes to the caller, and None has the servicer called. Raises PolicyError, or
        AttributeError for a method that the servicer lacks.
        """
        for policy in policies(service, default_max_bytes).values():
            method = getattr(servicer, policy.full_method.rpartition("/")[2])
            self.largest_request = max(self.largest_request, policy.max_request_bytes)
            parse = policy.request_class.FromString
            handler: grpc.RpcMethodHandler[Any, Any]
            if policy.server_streaming:
                behaviour = self._compose(policy, parse, _stream_servicer(method), self._admission_of_stream)
                handler = grpc.unary_stream_rpc_method_handler(behaviour)
            else:
                step = _unary_servicer(method, replay if policy.write is WriteMode.GUARDED else None)
                behaviour = self._compose(policy, parse, step, self._admission)
                handler = grpc.unary_unary_rpc_method_handler(behaviour)
            self._handlers[policy.full_method] = handler

    def mount(self, permission: str) -> Any:
        """Where a generated add_…_to_server function may add a service that is not ours.

        permission: what its callers need; empty: it is open to everyone.
        """
        return _Mount(self, permission)

    def mount_service(self, service: str, handlers: Mapping[str, Any], permission: str) -> None:
        """Serve a foreign service by its grpc method handlers."""
        for name, handler in handlers.items():
            policy = Policy(
                f"/{service}/{name}", permission, WriteMode.NONE, False, FOREIGN_REQUEST_BYTES, Message, Message
            )
            self._handlers[policy.full_method] = self._compose_foreign(policy, handler)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        """The composed handler of a method; the one for unknown methods else."""
        return self._handlers.get(handler_call_details.method, self._unknown)

    def end_streams(self) -> None:
        """End every open stream with UNAVAILABLE, SERVER_STOPPING: for the time of shutting down."""
        for call, task in self._streams.values():
            call.failure = errors.Unavailable("SERVER_STOPPING", "this server stops; go on at another one")
            task.cancel()

    # --- composition --------------------------------------------------------------------------------------------------

    def _compose(
        self,
        policy: Policy,
        parse: Callable[[bytes], Any] | None,
        servicer: Step,
        admission: Callable[[Step], Step] | None,
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        """The behaviour gRPC calls. admission: that layer; none for what a full server must answer too, as health."""
        layers: dict[str, Callable[[Step], Any]] = {
            "telemetry": lambda inner: self._telemetry(policy, inner),
            "errors": _errors,
            "admission": lambda inner: admission(inner) if admission else inner,
            "auth": lambda inner: self._auth(policy.permission, inner) if policy.permission else inner,
            "parse": lambda inner: _parse(policy.max_request_bytes, parse, inner) if parse else inner,
            "servicer": lambda inner: inner,
        }
        step: Any = servicer
        for name in reversed(LAYERS):
            step = layers[name](step)
        return step  # type: ignore[no-any-return]

    def _compose_foreign(self, policy: Policy, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        parse = handler.request_deserializer
        of_stream = self._admission_of_foreign_stream
        if handler.request_streaming and handler.response_streaming:
            behaviour = self._compose(policy, None, _foreign_stream(handler.stream_stream), of_stream)
            return grpc.stream_stream_rpc_method_handler(behaviour, parse, handler.response_serializer)
        if handler.response_streaming:
            behaviour = self._compose(policy, parse, _foreign_stream(handler.unary_stream), of_stream)
            return grpc.unary_stream_rpc_method_handler(behaviour, None, handler.response_serializer)
        if handler.request_streaming:
            raise NotImplementedError(f"{policy.full_method}: client streaming is not served")

        async def servicer(call: Call) -> Any:
            try:
                return await handler.unary_unary(call.request, call.context)
            except NotImplementedError:
                raise _unknown() from None

        behaviour = self._compose(policy, parse, servicer, None)
        return grpc.unary_unary_rpc_method_handler(behaviour, None, handler.response_serializer)

    def _compose_unknown(self) -> grpc.RpcMethodHandler[Any, Any]:
        # One name for all of them: metrics must not grow with what strangers ask for. A stream handler, since that one
        # starts before any request was read.
        policy = Policy("unknown", "", WriteMode.NONE, False, 0, Message, Message)

        async def servicer(_call: Call) -> NoReturn:
            raise _unknown()

        return grpc.stream_stream_rpc_method_handler(self._compose(policy, None, servicer, self._admission))

    # --- the layers ---------------------------------------------------------------------------------------------------

    def _telemetry(self, policy: Policy, inner: Step) -> Callable[[Any, Context], Awaitable[Any]]:
        """Make the Call; count it with its final code; log errors, and OK calls by the sample."""
        method = policy.full_method
        admission = self.admission
        sample = self._log_ok_sample
        observe = telemetry.RPC_SECONDS.observe
        new_trace = telemetry.Trace
        set_trace = telemetry.current_trace.set
        loop: asyncio.AbstractEventLoop | None = None

        async def layer(raw: Any, context: Any) -> Any:
            nonlocal loop
            started = perf_counter()
            if loop is None:  # asked for once: each time costs a system call (Python 3.11)
                loop = asyncio.get_running_loop()
            metadata = context.invocation_metadata()
            named = dict(metadata)
            authorization = named.get("authorization")
            if len(named) != len(metadata) and [key for key, _ in metadata].count("authorization") > 1:
                authorization = ""
            trace = new_trace(named.get("traceparent", ""))
            set_trace(trace)
            left = context.time_remaining()
            deadline = float("inf") if left is None else loop.time() + left
            call = Call(policy, raw, metadata, deadline, trace, NOBODY, admission, authorization, context)
            try:
                answer = await inner(call)
            except BaseException:
                code = context.code()
                name = code.name if code else "DEADLINE_EXCEEDED" if call.remaining() < 0.01 else "CANCELLED"
                seconds = perf_counter() - started
                observe(method, name, seconds)
                _log_error(call, name, seconds)
                raise
            seconds = perf_counter() - started
            observe(method, "OK", seconds)
            if sample and random() < sample:  # noqa: S311
                log.info("call", code="OK", **_facts(call, seconds))
            return answer

        return layer

    def _admission(self, inner: Step) -> Step:
        """Count unary calls and keep them to MAX_SECONDS."""
        admission = self.admission
        loop: asyncio.AbstractEventLoop | None = None

        async def layer(call: Call) -> Any:
            nonlocal loop
            if admission.in_flight >= admission.max_in_flight:
                admission.refuse("TOO_MANY_IN_FLIGHT", "too many calls are in flight here")
            if loop is None:
                loop = asyncio.get_running_loop()
            latest = loop.time() + MAX_SECONDS
            # A deadline within the limit needs no timer: gRPC itself cancels the call when it passes.
            timer = None
            if call.deadline > latest:
                call.deadline = latest
                timer = loop.call_at(latest, _expire, call, asyncio.current_task())
            admission.in_flight += 1
            try:
                return await inner(call)
            finally:
                admission.in_flight -= 1
                if timer is not None:
                    timer.cancel()

        return layer

    def _admission_of_stream(self, inner: Step) -> Step:
        return self._admission_of_streams(self.admission, inner)

    def _admission_of_foreign_stream(self, inner: Step) -> Step:
        return self._admission_of_streams(self._foreign_admission, inner)

    def _admission_of_streams(self, admission: Admission, inner: Step) -> Step:
        """Count streams among the waiting; remember them, so that they can be ended."""
        streams = self._streams

        async def layer(call: Call) -> Any:
            if admission.waiting >= admission.max_waiting:
                admission.refuse("TOO_MANY_WAITING", "too many calls are waiting here")
            admission.waiting += 1
            task = asyncio.current_task()
            assert task is not None
            streams[id(call)] = (call, task)
            try:
                return await inner(call)
            finally:
                admission.waiting -= 1
                del streams[id(call)]

        return layer

    def _auth(self, permission: str, inner: Step) -> Step:
        """Find the principal; refuse who lacks the method's permission."""
        cached = self._verifier.cached
        verify = self._verifier.verify

        def layer(call: Call) -> Awaitable[Any]:
            authorization = call.authorization
            if authorization is None:
                raise errors.Unauthenticated("TOKEN_MISSING", _NO_TOKEN)
            if authorization[:7].lower() != "bearer ":
                raise errors.Unauthenticated("TOKEN_INVALID", _NO_TOKEN)
            token = authorization[7:]
            principal = cached(token)
            if principal is None:
                return verified(call, token)
            if permission not in principal.permissions:
                raise _missing(permission)
            call.principal = principal
            return inner(call)

        async def verified(call: Call, token: str) -> Any:
            principal = await verify(token)
            call.principal = principal
            if permission not in principal.permissions:
                raise _missing(permission)
            return await inner(call)

        return layer


class _Mount:
    """Looks like a server to the generated add_…_to_server functions."""

    def __init__(self, chain: Chain, permission: str) -> None:
        self._chain = chain
        self._permission = permission

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Ignored: the same handlers come by name."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self._chain.mount_service(service, handlers, self._permission)


_NO_TOKEN = "a valid bearer token is required"  # noqa: S105


def _missing(permission: str) -> errors.PermissionDenied:
    return errors.PermissionDenied(
        "PERMISSION_MISSING", f"this needs the permission {permission}", metadata={"permission": permission}
    )


def _unknown() -> errors.Unimplemented:
    return errors.Unimplemented("METHOD_UNKNOWN", "there is no such method here")


def _expire(call: Call, task: asyncio.Task[Any] | None) -> None:
    call.failure = errors.DeadlineExceeded("DEADLINE_EXCEEDED", f"a call lasts {MAX_SECONDS:.0f} s at most")
    if task is not None:
        task.cancel()


def _errors(inner: Step) -> Step:
    """Turn whatever is raised into one definite status with details; nothing else reaches the caller."""

    async def layer(call: Call) -> Any:
        try:
            return await inner(call)
        except errors.ServiceError as error:
            failure = error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            if call.failure is not None:
                task.uncancel()
                failure = call.failure
            elif task.cancelling():
                raise  # the caller went away, or the server is at its end: nobody is left to be told
            else:
                # Something inside was cancelled, the call was not. gRPC would leave the caller without an answer.
                failure = errors.Unavailable("CALL_ABANDONED", "the call was given up inside; its outcome is unknown")
        except grpc.aio.BaseError:
            raise  # gRPC's own: the answer was given, or the caller went away
        except Exception:
            failure = _unforeseen(call)
        call.failure = failure
        try:
            status: Status = statuses.status_of(failure)
        except Exception:
            failure = call.failure = _unforeseen(call)
            status = statuses.status_of(failure)
        return await call.context.abort(
            statuses.code_of(failure),
            status.message,
            (("grpc-status-details-bin", status.SerializeToString()), *_pushback(failure), *call.trailers),
        )

    return layer


def _unforeseen(call: Call) -> errors.Internal:
    log.exception("unforeseen", method=call.policy.full_method, error_id=call.request_id)
    return errors.Internal("INTERNAL", f"internal error {call.request_id}", metadata={"error_id": call.request_id})


def _pushback(failure: errors.ServiceError) -> tuple[tuple[str, str], ...]:
    """What tells gRPC clients when to retry by themselves; a negative number: not at all."""
    if failure.retry_after is not None and failure.retry_after < 0:
        return (("grpc-retry-pushback-ms", "-1"),)
    if failure.retry_after is not None:
        return (("grpc-retry-pushback-ms", str(max(1, round(failure.retry_after * 1000)))),)
    if isinstance(failure, errors.ResourceExhausted):
        return (("grpc-retry-pushback-ms", "-1"),)
    return ()


def _parse(limit: int, parse: Callable[[bytes], Any], inner: Step) -> Step:
    """Make the request of the bytes, for callers who may call."""

    def layer(call: Call) -> Awaitable[Any]:
        raw = call.raw
        if len(raw) > limit:
            raise errors.ResourceExhausted(
                "REQUEST_TOO_LARGE",
                f"the request has {len(raw)} bytes; this method takes {limit}",
                metadata={"size": str(len(raw)), "limit": str(limit)},
            )
        try:
            call.request = parse(raw)
        except DecodeError:
            raise errors.InvalidArgument("REQUEST_MALFORMED", "the request is not a message of this method") from None
        return inner(call)

    return layer


def _unary_servicer(method: Callable[[Any, Call], Awaitable[Any]], replay: Replay | None) -> Step:
    async def servicer(call: Call) -> bytes:
        known = replay(call) if replay else None
        answer: Any = await (method(call.request, call) if known is None else known)
        if call.trailers:
            call.context.set_trailing_metadata(call.trailers)
        return answer if type(answer) is bytes else answer.SerializeToString()

    return servicer


def _stream_servicer(method: Callable[[Any, Call], Any]) -> Step:
    async def servicer(call: Call) -> None:
        write = call.context.write
        async with aclosing(method(call.request, call)) as answers:
            async for answer in answers:
                await write(answer if type(answer) is bytes else answer.SerializeToString())
        if call.trailers:
            call.context.set_trailing_metadata(call.trailers)

    return servicer


def _foreign_stream(behaviour: Any) -> Step:
    """A stream handler as generated code has it: a coroutine that writes by itself, or an async generator."""
    writes = inspect.iscoroutinefunction(behaviour)

    async def servicer(call: Call) -> None:
        request = call.raw if call.request is None else call.request
        try:
            if writes:
                await behaviour(request, call.context)
            else:
                async for answer in behaviour(request, call.context):
                    await call.context.write(answer)
        except DecodeError:
            raise errors.InvalidArgument("REQUEST_MALFORMED", "the request is not a message of this method") from None

    return servicer


def _facts(call: Call, seconds: float) -> dict[str, Any]:
    return {
        "method": call.policy.full_method,
        "milliseconds": round(seconds * 1000, 3),
        "peer": call.context.peer(),
        "tenant": call.principal.tenant,
        "subject": call.principal.subject,
    }


def _log_error(call: Call, code: str, seconds: float) -> None:
    facts = _facts(call, seconds)
    if call.failure is not None:
        facts["reason"] = call.failure.reason
        facts["message"] = call.failure.message
        notes = getattr(call.failure, "__notes__", None)
        if notes:
            facts["notes"] = "; ".join(notes)
    level = "error" if code in ("INTERNAL", "UNKNOWN") else "warning" if code == "UNAVAILABLE" else "info"
    getattr(log, level)("call", code=code, **facts)
