"""Holds the documents against the repository: links, make targets, and the table of environment variables.

`python .ci/docs.py` prints what is wrong and exits 1; with `--write` it makes docs/ENVIRONMENT.md anew.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pydantic_core import PydanticUndefined

from controller_svc.config import ControllerSettings
from idempotency_svc.config import IdempotencySettings
from svckit.config import ServiceSettings

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / "docs" / "ENVIRONMENT.md"

HEAD = """\
# Environment

Each service reads its configuration from the environment, once, before it serves; all faults are reported at once, one
line each, and the process exits 2. This file is made from the code by `make gen`.
"""

LOCAL = """
## `make up`

Sets what the services need by itself, and hands every other variable above on to both. Its own:

| variable | default | meaning |
|---|---|---|
| `DATABASE_URL` | | Use this Postgres instead of an embedded one. |
| `REDIS_URL` | | Use this Redis or Valkey instead of an embedded one. |
| `CONTROLLER_PORT`, `IDEMPOTENCY_PORT` | 8088, 8090 | Ports of the services. |
| `CONTROLLER_METRICS_PORT`, `IDEMPOTENCY_METRICS_PORT` | 9088, 9090 | Ports of their Prometheus endpoints. |
| `ISSUER_PORT` | 8089 | Port of the token issuer. |
| `POSTGRES_PORT`, `VALKEY_PORT` | 15432, 16379 | Ports of the embedded servers. |
| `LOCAL_DIR` | .local | Folder of the data, keys and logs. |
"""


def environment() -> str:
    """The text of docs/ENVIRONMENT.md."""
    text = HEAD
    for name, settings in (("controller_svc", ControllerSettings), ("idempotency_svc", IdempotencySettings)):
        text += f"\n## {name}\n\n| variable | default | meaning |\n|---|---|---|\n"
        shared = [base.model_fields for base in settings.__mro__[1:] if issubclass(base, ServiceSettings)]
        own_first = sorted(settings.model_fields, key=lambda field: sum(field in fields for fields in shared))
        for field in own_first:
            info = settings.model_fields[field]
            if info.is_required():
                default = "required"
            elif info.default in (None, "", PydanticUndefined):
                default = ""
            else:
                default = str(info.default).lower() if isinstance(info.default, bool) else str(info.default)
            description = (info.description or "").replace("|", "\\|")
            text += f"| `{field.upper()}` | {default} | {description} |\n"
    return text + LOCAL


def faults() -> list[str]:
    """What is wrong with the documents, one line each."""
    found = []
    if not ENVIRONMENT.exists() or ENVIRONMENT.read_text() != environment():
        found.append("docs/ENVIRONMENT.md is not what the configuration classes give: make gen")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")]
    for document in sorted(documents):
        text = document.read_text()
        name = document.relative_to(ROOT)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target and not (document.parent / target).exists():
                found.append(f"{name}: the link to {target} leads nowhere")
        for command in re.findall(r"(?:`|^ {4})make ([a-z]+)", text, re.MULTILINE):
            if command not in targets:
                found.append(f"{name}: there is no `make {command}`")
    return found


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        ENVIRONMENT.parent.mkdir(exist_ok=True)
        ENVIRONMENT.write_text(environment())
    wrong = faults()
    print("\n".join(wrong), end="\n" if wrong else "")
    sys.exit(bool(wrong))
