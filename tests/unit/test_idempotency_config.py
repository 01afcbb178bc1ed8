"""idempotency_svc's environment: what is required, what is checked, and that all faults are named at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from idempotency_svc.config import IdempotencySettings
from svckit.config import load

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment that is enough, without anything else of ours in it."""
    for name in IdempotencySettings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    key = tmp_path / "public.pem"
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    key.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:6379/0")
    monkeypatch.setenv("SERVICE_PUBLIC_KEY_FILE", str(key))
    return monkeypatch


def test_defaults(environment: pytest.MonkeyPatch) -> None:
    settings = load(IdempotencySettings)
    assert (settings.idempotency_host, settings.idempotency_port, settings.metrics_port) == ("127.0.0.1", 8090, 9090)
    assert settings.max_request_bytes == 4 << 20
    assert settings.redis_timeout_millis == 40
    assert (settings.service_issuer, settings.service_audience) == ("controller_svc", "idempotency_svc")


def test_every_field_is_described() -> None:
    assert [name for name, field in IdempotencySettings.model_fields.items() if not field.description] == []


def test_the_password_is_not_shown(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("REDIS_URL", "redis://:secret@127.0.0.1:6379/0")
    assert "secret" not in repr(load(IdempotencySettings))


@pytest.mark.parametrize("url", [
    "http://127.0.0.1", "127.0.0.1:6379", "redis://h:99999", "redis://h?socket_timeout=x", "redis://h?unknown=1",
    "redis+sentinel://h", "redis+sentinel:///service", "redis+sentinel://h/service/x", "redis+sentinel://a,,b/service",
    "redis+cluster://", "redis+cluster://h/1", "redis+cluster://a:x,b", "redis+cluster://h?unknown=1",
])  # fmt: skip
def test_a_wrong_redis_url_is_one_clear_line(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    environment.setenv("REDIS_URL", url)
    with pytest.raises(SystemExit) as exit_:
        load(IdempotencySettings)
    assert exit_.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("REDIS_URL: must be a redis://, redis+sentinel:// or redis+cluster:// URL")


@pytest.mark.parametrize("url", [
    "redis://h", "rediss://user:pw@h:7000/2", "unix:///run/redis.sock?db=1",
    "redis+sentinel://h/service", "rediss+sentinel://user:pw@a,b:1,[::1]:2/service/3?sentinel_password=x",
    "redis+cluster://h", "redis+cluster://user:pw@a:1,b:2/0",
])  # fmt: skip
def test_redis_urls(environment: pytest.MonkeyPatch, url: str) -> None:
    environment.setenv("REDIS_URL", url)
    assert load(IdempotencySettings).redis_url == url


def test_a_file_without_a_public_key_is_a_fault(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "public.pem").write_text("nothing")
    with pytest.raises(SystemExit):
        load(IdempotencySettings)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("SERVICE_PUBLIC_KEY_FILE: ")
    assert line.endswith("not a PEM public key")


def test_all_faults_are_named_at_once(environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    environment.delenv("REDIS_URL")
    environment.setenv("SERVICE_PUBLIC_KEY_FILE", "/nowhere.pem")
    environment.setenv("IDEMPOTENCY_PORT", "70000")
    environment.setenv("IDEMPOTENCY_HOST", "0.0.0.0")
    environment.setenv("REDIS_TIMEOUT_MILLIS", "0")
    with pytest.raises(SystemExit):
        load(IdempotencySettings)
    names = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert sorted(names) == [
        "IDEMPOTENCY_HOST", "IDEMPOTENCY_PORT", "REDIS_TIMEOUT_MILLIS", "REDIS_URL", "SERVICE_PUBLIC_KEY_FILE",
    ]  # fmt: skip
