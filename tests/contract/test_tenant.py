"""Every statement of the store keeps to a tenant: each use of a table that has tenants is tied to one.

Statements are all strings in the modules of controller_svc.store, put together as the code puts them together.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest

import controller_svc
import controller_svc.store
from controller_svc.store import read, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

TABLES = ("sessions", "tasks", "audit_events", "idempotency_guards")

OF_ALL_TENANTS = {
    "sessions.EXPIRABLE": "a sweep: answers keys with their tenants",
    "tasks.LOST_LEASES": "a sweep: answers keys with their tenants",
    "tasks.RECENT_ORPHANS": "a sweep: answers keys with their tenants",
    "tasks.ROUND": "a sweep: answers keys with their tenants",
    "guards.PURGE": "deletes what has expired, whosever it is",
}
"""Statements that are for all tenants at once, and why they may be."""

TABLE = re.compile(rf"\b(from|join|update|into|using)\s+({'|'.join(TABLES)})\b(?:\s+(?:as\s+)?(\w+))?", re.IGNORECASE)
EQUAL = re.compile(r"(?:(\w+)\.)?\btenant\s*=\s*(?:(?:(\w+)\.)?(tenant)\b|(\$\d+|%\(\w+\)s|%s))", re.IGNORECASE)
KEYWORDS = {
    "where",
    "set",
    "on",
    "join",
    "order",
    "limit",
    "for",
    "using",
    "left",
    "cross",
    "values",
    "select",
    "group",
}


def violations(statement: str) -> list[str]:
    """The uses of tables in a statement that are tied to no tenant given from outside."""
    found = []
    for match in TABLE.finditer(statement):
        verb, table, alias = match[1].lower(), match[2], match[3]
        scope = enclosing(statement, match.start())
        if verb == "into":
            columns = re.match(r"[^(]*\(([^)]*)\)", statement[match.end(2) :])
            if columns is None or "tenant" not in re.findall(r"\w+", columns[1]):
                found.append(f"{verb} {table}")
            continue
        name = alias if alias and alias.lower() not in KEYWORDS else ""
        if not is_tied(name, scope):
            found.append(f"{verb} {table} {name}".strip())
    return found


def enclosing(statement: str, position: int) -> str:
    """The innermost parentheses around a position, or the whole statement."""
    opened: list[int] = []
    for index, character in enumerate(statement):
        if character == "(":
            opened.append(index)
        elif character == ")" and opened:
            start = opened.pop()
            if start < position < index:
                return statement[start + 1 : index]
    return statement


def is_tied(name: str, scope: str) -> bool:
    """Whether equalities of tenants lead from `name` to a parameter or to what is no table of ours in this scope."""
    ours = {match[3] for match in TABLE.finditer(scope) if match[1].lower() != "into"}
    reached, waiting = set(), [name]
    while waiting:
        here = waiting.pop()
        if here in reached:
            continue
        reached.add(here)
        for left, right, is_tenant, parameter in EQUAL.findall(scope):
            if here not in (left, right):
                continue
            if parameter and left == here:
                return True
            other = right if left == here else left
            if is_tenant and other and other not in ours:
                return True
            if is_tenant:
                waiting.append(other)
    return False


def statements() -> Iterator[tuple[str, str]]:
    """(name, text) of all that could be SQL in the store; the name of a module's constant, else its line."""
    for module in modules(controller_svc.store):
        label = module.__name__.rpartition(".")[2]
        for name, value in vars(module).items():
            if isinstance(value, str):
                yield f"{label}.{name}", value
        for line, text in strings(ast.parse(inspect.getsource(module)), module):
            yield f"{label}:{line}", text
    for name, (text, _) in read.ROWS.items():
        yield f"read.ROWS[{name}]", text
    sets = [frozenset(names) for size in range(len(write.TABLES) + 1) for names in combinations(write.TABLES, size)]
    for new in sets:
        for changed in sets:
            for wait in (False, True):
                yield f"write.statement({set(new)}, {set(changed)})", write.statement((new, changed, True), wait)


def modules(package: ModuleType) -> list[ModuleType]:
    return [
        importlib.import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    ]


def strings(node: ast.AST, module: ModuleType) -> Iterator[tuple[int, str]]:
    """(line, text) of each expression of strings, as large as it goes."""
    for child in ast.iter_child_nodes(node):
        text = folded(child, module)
        if text is None or not isinstance(child, ast.expr):
            yield from strings(child, module)
        else:
            yield child.lineno, text


def folded(node: ast.AST, module: ModuleType) -> str | None:
    """The text of an expression of strings, with what only a run can tell left out; None if it is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Name):
        value = getattr(module, node.id, None)
        return value if isinstance(value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(folded(part, module) or "" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return folded(node.value, module)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = folded(node.left, module), folded(node.right, module)
        return None if left is None and right is None else (left or "") + (right or "")
    return None


def test_every_statement_keeps_to_a_tenant() -> None:
    seen = list(statements())
    exceptions = {text: name for name, text in seen if name in OF_ALL_TENANTS}
    broken = {name: found for name, text in seen if (found := violations(text)) and text not in exceptions}
    assert broken == {}
    # The exceptions are needed, and the look has seen what it is to look at.
    assert {name for text, name in exceptions.items() if violations(text)} == set(OF_ALL_TENANTS)
    assert sum(bool(TABLE.search(text)) for _, text in seen) > 40


def test_there_is_no_sql_outside_the_store() -> None:
    sql = re.compile(rf"\b(select|update|delete|insert)\b.*\b({'|'.join(TABLES)})\b", re.IGNORECASE | re.DOTALL)
    for module in (*modules(controller_svc), *modules(importlib.import_module("controller_svc.core"))):
        tree = ast.parse(inspect.getsource(module))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert not sql.search(node.value), f"{module.__name__}:{node.lineno}"


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("select 1 from tasks where tenant = $1 and id = $2", []),
        ("select 1 from tasks where id = $2", ["from tasks"]),
        ("select tenant from tasks where id = %(id)s", ["from tasks"]),
        ("select 1 from tasks t where t.tenant = %s", []),
        ("update tasks set version = 2 where id = $1", ["update tasks"]),
        ("update tasks as t set version = 2 from kept where t.tenant = kept.tenant", []),
        ("select 1 from sessions s join tasks t on t.session_id = s.id where s.tenant = $1", ["join tasks t"]),
        ("select 1 from sessions s join tasks t on t.tenant = s.tenant where s.tenant = $1", []),
        ("select 1 from sessions s join tasks t on t.tenant = s.tenant", ["from sessions s", "join tasks t"]),
        ("select 1 from unnest($1) k(tenant) join tasks t on t.tenant = k.tenant", []),
        ("select (select 1 from tasks t where t.tenant = s.tenant) from sessions s where s.tenant = $1", []),
        ("select (select 1 from tasks t where t.id = $2) from sessions t where t.tenant = $1", ["from tasks t"]),
        ("insert into tasks (tenant, id) values ($1, $2)", []),
        ("insert into idempotency_guards as k (scope) values ($1)", ["into idempotency_guards"]),
    ],
)
def test_the_look_itself(statement: str, found: list[str]) -> None:
    assert violations(statement) == found


def test_what_is_put_together_is_seen() -> None:
    source: Any = ast.parse('x = "select " + COLUMNS + " from tasks"; f"select {COLUMNS} from tasks"').body
    for node in (source[0].value, source[1].value):
        assert violations(folded(node, importlib.import_module("controller_svc.store.tasks")) or "") == ["from tasks"]
