"""A bare grpc.aio server as its own process: it answers CreateSession, always with the same bytes, and nothing else.

What it reaches is what a Python process can reach at most: nothing is parsed, checked, stored or counted here.
"""

from __future__ import annotations

import sys

import grpc
import uvloop

from deploy.local.processes import LOOPBACK
from tests.load.calls import example_answer, path


async def serve(port: int) -> None:
    """Serve on this loopback port until the process is ended."""
    answer = example_answer()

    async def respond(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return answer

    service, _, method = path("echo").removeprefix("/").partition("/")
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {method: grpc.unary_unary_rpc_method_handler(respond)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"{LOOPBACK}:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
