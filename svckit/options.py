"""Each method's policy, read from its proto: who may call it, how it writes, how large a request may be."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.message_factory import GetMessageClass

from orchestrator.options.v1 import options_pb2

if TYPE_CHECKING:
    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
    from google.protobuf.message import Message


class WriteMode(enum.Enum):
    """How a method changes state: not at all, through the door for writes, or without it."""

    NONE = options_pb2.WRITE_MODE_NONE
    GUARDED = options_pb2.WRITE_MODE_GUARDED
    UNGUARDED = options_pb2.WRITE_MODE_UNGUARDED


@dataclass(frozen=True, slots=True)
class Policy:
    """What is decided about a method before any of its calls. `full_method` is "/package.Service/Method"."""

    full_method: str
    permission: str
    write: WriteMode
    key_required: bool
    max_request_bytes: int
    request_class: type[Message]
    response_class: type[Message]
    server_streaming: bool = False


class PolicyError(Exception):
    """A method has no complete policy option; a service with such a method must not start."""


def policies(service: ServiceDescriptor, default_max_bytes: int) -> dict[str, Policy]:
    """The policy of every method of `service`, by full method name.

    default_max_bytes: the limit of methods whose option leaves max_request_bytes at 0.
    Raises PolicyError naming every method without the option, without a permission or without a write mode, every
    guarded stream, and every client-streaming method: those are not served.
    """
    found: dict[str, Policy] = {}
    faults: list[str] = []
    for method in service.methods:
        fault = _fault(method)
        if fault:
            faults.append(f"{method.full_name}: {fault}")
            continue
        option = method.GetOptions().Extensions[options_pb2.policy]
        full_method = f"/{service.full_name}/{method.name}"
        found[full_method] = Policy(
            full_method=full_method,
            permission=option.permission,
            write=WriteMode(option.write),
            key_required=option.key_required,
            max_request_bytes=option.max_request_bytes or default_max_bytes,
            request_class=GetMessageClass(method.input_type),
            response_class=GetMessageClass(method.output_type),
            server_streaming=method.server_streaming,
        )
    if faults:
        raise PolicyError("; ".join(faults))
    return found


def _fault(method: MethodDescriptor) -> str:
    options = method.GetOptions()
    if not options.HasExtension(options_pb2.policy):
        return "no policy option"
    option = options.Extensions[options_pb2.policy]
    if not option.permission:
        return "its policy names no permission"
    if option.write == options_pb2.WRITE_MODE_UNSPECIFIED:
        return "its policy names no write mode"
    if option.write == options_pb2.WRITE_MODE_GUARDED and method.server_streaming:
        return "a stream cannot be guarded: it has no one answer to keep"
    if method.client_streaming:
        return "client streaming is not served"
    return ""
