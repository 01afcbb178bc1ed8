"""The state of what this process depends on."""

from __future__ import annotations

from datetime import datetime

from controller_svc.core.values import value_class


@value_class(frozen=True, slots=True)
class Component:
    """The state of a dependency."""

    up: bool | None
    """None where it is switched off."""
    detail: str
    """What is wrong, for an operator; empty when nothing is."""
    since: datetime
    """When `up` changed last."""
