"""Pages of lists: how much one holds, and the signed token that leads to the next."""

from __future__ import annotations

import hmac
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from svckit.errors import InvalidArgument, invalid_field

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DEFAULT_PAGE_SIZE: Final = 20
MAX_PAGE_SIZE: Final = 100

_MAC_BYTES = 32


class ListRequest(Protocol):
    """What every list request has."""

    page_size: int
    page_token: str


class Item(Protocol):
    """What a list is ordered by."""

    @property
    def id(self) -> object:
        """Its text is the cursor."""
        ...


class PageTokens:
    """Signs and opens page tokens, each good only for the tenant, method and filters it was made for.

    Replicas with the same key open each other's.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, tenant: str, method: str, filters: Iterable[object], cursor: str) -> str:
        """A token that leads to what comes after `cursor`."""
        return _encode(self._mac(tenant, method, filters, cursor) + cursor.encode())

    def open(self, token: str, tenant: str, method: str, filters: Iterable[object]) -> str:
        """The cursor of a token that `sign` made for the same tenant, method and filters.

        Raises InvalidArgument PAGE_TOKEN_INVALID naming page_token for any other token.
        """
        try:
            data = urlsafe_b64decode(token + "=" * (-len(token) % 4))
            cursor = data[_MAC_BYTES:].decode()
        except ValueError:
            raise _invalid() from None
        genuine = hmac.compare_digest(self._mac(tenant, method, filters, cursor), data[:_MAC_BYTES])
        # Decoding passes over what is not base64: only the spelling that `sign` gives is the token.
        if not genuine or _encode(data) != token:
            raise _invalid()
        return cursor

    def page(self, request: ListRequest, tenant: str, method: str, filters: Iterable[object]) -> Page:
        """The page asked for. Raises InvalidArgument naming page_size if negative, page_token if not ours."""
        if request.page_size < 0:
            raise invalid_field("page_size", "Must not be negative.")
        bound = tuple(filters)
        return Page(
            tokens=self,
            tenant=tenant,
            method=method,
            filters=bound,
            size=min(request.page_size, MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE,
            after=self.open(request.page_token, tenant, method, bound) if request.page_token else None,
        )

    def _mac(self, tenant: str, method: str, filters: Iterable[object], cursor: str) -> bytes:
        bound = [tenant, method, [None if value is None else str(value) for value in filters], cursor]
        return hmac.digest(self._key, json.dumps(bound).encode(), "sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page of a list."""

    tokens: PageTokens
    tenant: str
    method: str
    filters: tuple[object, ...]
    size: int
    after: str | None
    """The cursor it starts behind; None at the start of the list."""

    def next_token(self, items: Sequence[Item]) -> str:
        """The token of the page behind this one, empty if there is none; `items` were read up to size + 1."""
        if len(items) <= self.size:
            return ""
        return self.tokens.sign(self.tenant, self.method, self.filters, str(items[self.size - 1].id))


def _encode(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


def _invalid() -> InvalidArgument:
    return invalid_field("page_token", "Must be a token this method gave for the same filters.", "PAGE_TOKEN_INVALID")
