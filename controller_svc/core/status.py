"""The state of what this process depends on."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Component:
    """The state of a dependency."""

    up: bool | None
    """None where it is switched off."""
    detail: str
    """What is wrong, for an operator; empty when nothing is."""
    since: datetime
    """When `up` changed last."""
