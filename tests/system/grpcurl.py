"""grpcurl as a caller that shares no code with us: it knows the protos, and what comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from deploy.local.processes import ROOT

_BIN = ROOT / ".local" / "bin"
_PROTOS = ROOT / "protos"
_GOOGLE_PROTOS = Path(error_details_pb2.__file__).parents[2]
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Refused(Exception):
    """An error answer: its status code, and the reason and metadata of its ErrorInfo."""

    code: grpc.StatusCode
    reason: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Grpcurl:
    """grpcurl against one server without TLS, with the schema from our protos."""

    program: str
    target: str

    def call(self, method: str, request: Mapping[str, object], token: str, *, key: str = "") -> dict[str, Any]:
        """The answer of `Service/Method` of the controller's API, as JSON; raises Refused for an error answer.

        key: the idempotency key; empty for none.
        """
        headers = [f"-H=idempotency-key: {key}"] if key else []
        schema = [f"-import-path={_PROTOS}", f"-import-path={_GOOGLE_PROTOS}", "-proto=google/rpc/error_details.proto"]
        schema += [f"-proto={file.relative_to(_PROTOS)}" for file in _PROTOS.glob("orchestrator/controller/v1/*.proto")]
        command = [*headers, *schema, "-d=@", self.target, f"orchestrator.controller.v1.{method}"]
        answer: dict[str, Any] = json.loads(self._run(command, token, json.dumps(request)))
        return answer

    def services(self, token: str) -> list[str]:
        """The names of the server's services, by reflection; raises Refused when reflection is refused."""
        return self._run([self.target, "list"], token).split()

    def _run(self, arguments: list[str], token: str, request: str = "") -> str:
        # The token goes through the environment: an argument list is for everyone on the machine to read.
        fixed = ["-plaintext", "-max-time=20", "-format-error", "-expand-headers"]
        fixed += ["-H=authorization: Bearer ${GRPCURL_TOKEN}"] if token else []
        ended = subprocess.run(
            [self.program, *fixed, *arguments],
            input=request,
            env={**os.environ, "GRPCURL_TOKEN": token},
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode == 0:
            return ended.stdout
        try:
            status = json.loads(ended.stderr)
        except ValueError:
            raise AssertionError(f"grpcurl: {ended.stderr.strip()}") from None
        (info,) = (detail for detail in status["details"] if detail["@type"].endswith("/google.rpc.ErrorInfo"))
        assert info["domain"] == "orchestrator"
        raise Refused(_CODES[status["code"]], info["reason"], info.get("metadata", {}))


def grpcurl(target: str) -> Grpcurl:
    """grpcurl from PATH or from .local/bin; without it the test is skipped."""
    program = shutil.which("grpcurl", path=f"{os.environ.get('PATH', '')}{os.pathsep}{_BIN}")
    if program is None:
        pytest.skip("grpcurl is not here: `make tools` gets it")
    return Grpcurl(program, target)
