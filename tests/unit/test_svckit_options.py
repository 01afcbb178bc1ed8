"""Policies as read from descriptors."""

from __future__ import annotations

import pytest

from orchestrator.options.v1 import options_pb2
from svckit.options import PolicyError, WriteMode, policies
from tests.rpc.svckit_parts import Text, make_service


def test_policies() -> None:
    service = make_service(
        "Policies",
        {
            "Plain": {},
            "Guarded": {
                "permission": "orchestrator.operate",
                "write": options_pb2.WRITE_MODE_GUARDED,
                "key_required": True,
                "max_request_bytes": 7,
            },
            "Stream": {"write": options_pb2.WRITE_MODE_UNGUARDED, "stream": True},
        },
    )
    found = policies(service, 16384)
    assert list(found) == [f"/svckit.test.Policies/{name}" for name in ("Plain", "Guarded", "Stream")]
    plain, guarded, stream = found.values()
    assert (plain.permission, plain.write, plain.key_required) == ("orchestrator.agent", WriteMode.NONE, False)
    assert (plain.max_request_bytes, plain.server_streaming) == (16384, False)
    assert (guarded.permission, guarded.write, guarded.key_required) == (
        "orchestrator.operate",
        WriteMode.GUARDED,
        True,
    )
    assert guarded.max_request_bytes == 7
    assert (stream.write, stream.server_streaming) == (WriteMode.UNGUARDED, True)
    assert plain.request_class is Text
    assert plain.response_class is Text


def test_nothing_is_allowed_by_default() -> None:
    service = make_service(
        "Faulty",
        {
            "Fine": {},
            "NoOption": {"policy": False},
            "NoPermission": {"permission": ""},
            "NoWriteMode": {"write": options_pb2.WRITE_MODE_UNSPECIFIED},
            "GuardedStream": {"write": options_pb2.WRITE_MODE_GUARDED, "stream": True},
            "Upload": {"upload": True},
        },
    )
    with pytest.raises(PolicyError) as error:
        policies(service, 16384)
    text = str(error.value)
    assert "Fine" not in text
    for name in ("NoOption", "NoPermission", "NoWriteMode", "GuardedStream", "Upload"):
        assert f"svckit.test.Faulty.{name}:" in text
