"""Prints an access token for the pair of `make up`: `make token ROLE=planner,reviewer SUBJECT=… TENANT=… HOURS=…`."""

from __future__ import annotations

import os
import sys

from deploy.local.folder import Folder
from deploy.local.processes import LocalError

MOST_HOURS = 24


def main() -> None:
    """Read the four variables and print one token; a fault is one line on stderr, and exit 1."""
    roles = os.environ.get("ROLE", "").replace(",", " ").split()
    try:
        hours = float(os.environ.get("HOURS") or 1)
        if not 0 < hours <= MOST_HOURS:
            raise ValueError
    except ValueError:
        raise LocalError(f"HOURS is a number above 0, and at most {MOST_HOURS}") from None
    print(
        Folder()
        .issuer()
        .token(
            subject=os.environ.get("SUBJECT") or "local-user",
            tenant=os.environ.get("TENANT") or "local",
            roles=["orchestrator.agent", *roles],
            seconds=hours * 3600,
        )
    )


if __name__ == "__main__":
    try:
        main()
    except (LocalError, OSError) as fault:
        print(f"make token: {fault}", file=sys.stderr)
        sys.exit(1)
