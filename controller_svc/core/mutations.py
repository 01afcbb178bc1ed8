"""What a write is: who acts, which rows a command needs, and what is to be true after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

from controller_svc.core.values import value_class
from svckit.errors import PermissionDenied

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from controller_svc.core.audit import AuditEvent

Table = Literal["sessions", "tasks"]

SYSTEM = "system"
"""The subject in whose name the server acts by itself."""


@value_class(frozen=True, slots=True, kw_only=True)
class Actor:
    """In whose name a command runs; every row it touches is of `tenant`."""

    issuer: str
    tenant: str
    subject: str
    roles: frozenset[str]
    """Agent roles held."""
    operate: bool
    """Whether it may change every resource of its tenant, whatever roles it holds."""
    on_behalf_of: str = ""

    def holds(self, role: str) -> bool:
        """Whether the actor may act in this agent role."""
        return self.operate or role in self.roles

    def require(self, role: str) -> None:
        """Raises PermissionDenied ROLE_NOT_HELD unless the actor may act in this agent role."""
        if not self.holds(role):
            raise PermissionDenied(
                "ROLE_NOT_HELD", f'The role "{role}" is required and not held.', metadata={"role": role}
            )

    def acting_role(self, role: str) -> str:
        """The role as the audit trail names it: empty if the actor acts without holding it."""
        return role if role in self.roles else ""


def system_actor(tenant: str) -> Actor:
    """The server itself, in a tenant."""
    return Actor(issuer="", tenant=tenant, subject=SYSTEM, roles=frozenset(), operate=True)


class Key(NamedTuple):
    """Names one row."""

    table: Table
    tenant: str
    id: UUID


class Lookup(NamedTuple):
    """Names a bounded look-up that is no row; each name says what it answers.

    `unfinished_tasks`: int, how many tasks of the session `id` are PENDING, BLOCKED or RUNNING, counted up to 1.
    """

    name: Literal["unfinished_tasks"]
    tenant: str
    id: UUID


class Row(Protocol):
    """A resource as it is stored; `version` starts at 1 and advances by one per change."""

    table: ClassVar[Table]

    @property
    def tenant(self) -> str:
        """Whose it is."""
        ...

    @property
    def id(self) -> UUID:
        """Unique in its table and tenant."""
        ...

    @property
    def version(self) -> int:
        """The etag's number."""
        ...

    @property
    def state(self) -> str:
        """Where its state machine stands."""
        ...


Rows = Mapping[Key | Lookup, Any]
"""What was read: a row of the key's table, a look-up's value, or None for a row that was asked for and is absent."""


class Keys(NamedTuple):
    """What a command needs to have read before it can be decided."""

    change: tuple[Key, ...] = ()
    """Rows it may change: no other command of the process changes them meanwhile."""
    look: tuple[Key | Lookup, ...] = ()
    """Read only."""


@value_class(frozen=True, slots=True)
class Decision:
    """What is to be true afterwards."""

    rows: tuple[Row, ...]
    """New rows (version 1) or changed ones (version read + 1); empty for no change."""
    answer: object
    """The resource to answer with."""
    events: tuple[AuditEvent, ...]
    """One per row in `rows`, in the same order."""


C_contra = TypeVar("C_contra", contravariant=True)


class Mutation(Protocol[C_contra]):
    """The use case of one RPC or sweep: pure, about one command, ignorant of keys, groups and SQL."""

    @property
    def method(self) -> str:
        """The full RPC name `/package.Service/Method`; a sweep has one of the same form."""
        ...

    def reads(self, command: C_contra, found: Rows) -> Keys:
        """All that `decide` needs, as far as `found` tells; asked again until nothing new is asked."""
        ...

    def decide(self, command: C_contra, found: Rows, now: datetime) -> Decision:
        """What is to be true after the command. `now` is Postgres' clock. Raises ServiceError to refuse."""
        ...
