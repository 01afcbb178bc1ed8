"""Page tokens: good only where they were made, and only as they were made."""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass
from uuid import UUID

import pytest

from controller_svc.core.ids import new_id
from controller_svc.pages import PageTokens
from svckit.errors import InvalidArgument

METHOD = "/orchestrator.controller.v1.SessionService/ListSessions"
FILTERS = ("planner", None, "ACTIVE")
PAGES = PageTokens(b"k" * 32)
CURSOR = str(new_id())
TOKEN = PAGES.sign("acme", METHOD, FILTERS, CURSOR)


@dataclass
class Request:
    page_size: int = 0
    page_token: str = ""


@dataclass
class Item:
    id: UUID


def refused(token: str, tenant: str = "acme", method: str = METHOD, filters: tuple[object, ...] = FILTERS) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        PAGES.open(token, tenant, method, filters)
    assert refusal.value.reason == "PAGE_TOKEN_INVALID"
    assert [field for field, _ in refusal.value.fields] == ["page_token"]


def test_a_token_leads_back_to_its_cursor() -> None:
    assert PAGES.open(TOKEN, "acme", METHOD, FILTERS) == CURSOR
    assert PageTokens(b"k" * 32).open(TOKEN, "acme", METHOD, list(FILTERS)) == CURSOR
    for cursor in ("0", "9" * 19, "", "ß"):
        assert PAGES.open(PAGES.sign("acme", METHOD, (), cursor), "acme", METHOD, ()) == cursor


def test_every_byte_counts() -> None:
    raw = base64.urlsafe_b64decode(TOKEN + "=" * (-len(TOKEN) % 4))
    for index in range(len(raw)):
        for bit in range(8):
            changed = bytearray(raw)
            changed[index] ^= 1 << bit
            refused(base64.urlsafe_b64encode(changed).decode().rstrip("="))
    for length in range(len(raw)):
        refused(base64.urlsafe_b64encode(raw[:length]).decode().rstrip("="))


def test_every_character_counts() -> None:
    for index, character in enumerate(TOKEN):
        for other in "ABab01-_+/=. \n\0\u00e9":
            if other != character:
                refused(TOKEN[:index] + other + TOKEN[index + 1 :])
        for inserted in "A= \n-":
            refused(TOKEN[:index] + inserted + TOKEN[index:])
        refused(TOKEN[:index] + TOKEN[index + 1 :])
    for extended in (TOKEN + "=", TOKEN + "==", TOKEN + "A", TOKEN + "\n", TOKEN + TOKEN):
        refused(extended)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_a_cursor_of_any_length_has_one_spelling(length: int) -> None:
    token = PAGES.sign("acme", METHOD, FILTERS, "1" * length)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for last in alphabet:
        if last != token[-1]:
            refused(token[:-1] + last)


def test_nonsense_is_refused() -> None:
    rng = random.Random(1)
    for token in ("x", "=", "====", "ß", "\ud800", "A" * 42, "A" * 43, "A" * 91, "A" * 16000):
        refused(token)
    for _ in range(500):
        refused(
            "".join(chr(rng.choice([rng.randint(0, 127), rng.randint(0, 0x2FFF)])) for _ in range(rng.randint(1, 99)))
        )


@pytest.mark.parametrize(
    ("tenant", "method", "filters"),
    [
        ("other", METHOD, FILTERS),
        ("", METHOD, FILTERS),
        ("acme", METHOD.replace("Session", "Task"), FILTERS),
        ("acme", METHOD, ("planner", None, None)),
        ("acme", METHOD, ("planner", None)),
        ("acme", METHOD, ("planner", None, "ACTIVE", None)),
        ("acme", METHOD, ("planner", "", "ACTIVE")),
        ("acme", METHOD, ("planner", "None", "ACTIVE")),
        ("acme", METHOD, (None, "planner", "ACTIVE")),
        ("acme", METHOD, ("planner", None, "PENDING")),
        ("acme", METHOD, ("planner, None", "ACTIVE")),
        ("acme", METHOD, ()),
        ("acme" + METHOD[0], METHOD[1:], FILTERS),
    ],
)
def test_a_token_is_good_only_where_it_was_made(tenant: str, method: str, filters: tuple[object, ...]) -> None:
    refused(TOKEN, tenant, method, filters)


def test_another_key_makes_other_tokens() -> None:
    refused(PageTokens(b"j" * 32).sign("acme", METHOD, FILTERS, CURSOR))


@pytest.mark.parametrize(
    ("asked", "given"), [(0, 20), (1, 1), (20, 20), (99, 99), (100, 100), (101, 100), (2**31 - 1, 100)]
)
def test_the_size_of_a_page(asked: int, given: int) -> None:
    assert PAGES.page(Request(page_size=asked), "acme", METHOD, FILTERS).size == given


@pytest.mark.parametrize("asked", [-1, -(2**31)])
def test_a_negative_size_is_refused(asked: int) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        PAGES.page(Request(page_size=asked), "acme", METHOD, FILTERS)
    assert refusal.value.reason == "FIELD_INVALID"
    assert [field for field, _ in refusal.value.fields] == ["page_size"]


def test_pages_follow_each_other_to_the_end() -> None:
    items = [Item(new_id(1_700_000_000 - index)) for index in range(7)]
    read: list[Item] = []
    token = ""
    for expected in (3, 3, 1):
        page = PAGES.page(Request(page_size=3, page_token=token), "acme", METHOD, FILTERS)
        rest = [item for item in items if page.after is None or str(item.id) < page.after]
        found = rest[: page.size + 1]
        read += found[: page.size]
        assert len(found[: page.size]) == expected
        token = page.next_token(found)
    assert token == ""
    assert read == items


def test_a_full_last_page_has_no_next() -> None:
    page = PAGES.page(Request(page_size=2), "acme", METHOD, FILTERS)
    assert page.next_token([Item(new_id()), Item(new_id())]) == ""
    assert page.next_token([]) == ""


def test_a_page_of_a_foreign_token_is_refused() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        PAGES.page(Request(page_token=TOKEN), "other", METHOD, FILTERS)
    assert refusal.value.reason == "PAGE_TOKEN_INVALID"
