"""A worker that claims one task and holds on to it, to be killed.

    python -m tests.system.worker TARGET TOKEN ROLE

Prints the task's id and the lease's, then heartbeats for ever.
"""

from __future__ import annotations

import asyncio
import sys

from tests.client import Agent


async def main(target: str, token: str, role: str) -> None:
    """Works until it is killed."""
    agent = Agent(target, token)
    (claimed,) = await agent.claim(role, wait=20)
    print(claimed.task.id, claimed.lease_id, flush=True)
    while True:
        assert (await agent.heartbeat(claimed)).ok
        await asyncio.sleep(claimed.task.lease_timeout.seconds / 3)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
