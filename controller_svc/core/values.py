"""How the core's records are declared, which nobody changes once they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

__all__ = ["value_class"]

if TYPE_CHECKING:
    from dataclasses import dataclass as value_class
else:

    def value_class(*, frozen: bool, **options: Any) -> Any:
        """As dataclass, with the same hash; that its instances are frozen is the type checker's business.

        Frozen at runtime, each takes two and a half times as long to make, and a write makes five.
        """
        return dataclass(**options, unsafe_hash=frozen)
