"""The shared configuration: everything wrong is said at once, and nothing unsafe is a default."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from svckit.config import ListenHost, OidcSettings, Port, ServiceKeySettings, ServiceSettings, is_loopback, load


class Settings(OidcSettings, ServiceKeySettings):
    """As a service would have it."""

    some_host: ListenHost = Field(default="127.0.0.1", description="Where to listen.")
    some_port: Port = Field(default=8088, description="Port.")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("OIDC_ISSUER_URL", "https://issuer.example/realm")
    monkeypatch.setenv("OIDC_AUDIENCE", "orchestrator")


def faults(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    with pytest.raises(SystemExit) as end:
        load(Settings)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return dict(line.split(": ", 1) for line in captured.err.splitlines())


def test_defaults() -> None:
    settings = load(Settings)
    assert settings.oidc_issuer_url == "https://issuer.example/realm"
    assert settings.max_request_bytes == 16384
    assert settings.reflection == "authenticated"
    assert settings.allow_plaintext is False
    assert settings.default_tenant == ""
    assert settings.oidc_roles_claim == "realm_access.roles"


def test_every_field_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_every_fault_is_told_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OIDC_ISSUER_URL")
    monkeypatch.delenv("OIDC_AUDIENCE")
    monkeypatch.setenv("SOME_PORT", "70000")
    monkeypatch.setenv("SOME_HOST", "0.0.0.0")
    monkeypatch.setenv("LOG_OK_SAMPLE", "much")
    monkeypatch.setenv("REFLECTION", "yes")
    monkeypatch.setenv("DEFAULT_TENANT", "a/b")
    monkeypatch.setenv("TLS_KEY_FILE", "/nowhere")
    found = faults(capsys)
    assert set(found) == {
        "OIDC_ISSUER_URL",
        "OIDC_AUDIENCE",
        "SOME_PORT",
        "SOME_HOST",
        "LOG_OK_SAMPLE",
        "REFLECTION",
        "DEFAULT_TENANT",
        "TLS_KEY_FILE",
    }
    assert found["OIDC_ISSUER_URL"] == "is required"
    assert "ALLOW_PLAINTEXT" in found["SOME_HOST"]


@pytest.mark.parametrize("name", ["OIDC_ISSUER_URL", "OIDC_AUDIENCE"])
@pytest.mark.parametrize("value", [None, ""])
def test_no_start_without_identity(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    assert set(faults(capsys)) == {name}


def test_plaintext_outside_loopback_is_explicit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_HOST", "0.0.0.0")
    assert set(faults(capsys)) == {"SOME_HOST"}
    monkeypatch.setenv("OIDC_JWKS_URL", "http://keycloak:8080/certs")
    assert set(faults(capsys)) == {"SOME_HOST", "OIDC_JWKS_URL"}
    monkeypatch.setenv("ALLOW_PLAINTEXT", "true")
    load(Settings)
    monkeypatch.delenv("ALLOW_PLAINTEXT")
    monkeypatch.delenv("OIDC_JWKS_URL")
    for name in ("TLS_CERT_FILE", "TLS_KEY_FILE"):
        path = tmp_path / name
        path.touch()
        monkeypatch.setenv(name, str(path))
    load(Settings)


def test_tls_files_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "some.pem"
    path.touch()
    monkeypatch.setenv("TLS_CERT_FILE", str(path))
    assert set(faults(capsys)) == {"TLS_KEY_FILE"}
    monkeypatch.delenv("TLS_CERT_FILE")
    monkeypatch.setenv("TLS_CLIENT_CA_FILE", str(path))
    assert set(faults(capsys)) == {"TLS_CLIENT_CA_FILE"}


@pytest.mark.parametrize("url", ["ftp://x", "issuer.example", "https://", "http://issuer.example"])
def test_issuer_urls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str) -> None:
    monkeypatch.setenv("OIDC_ISSUER_URL", url)
    assert set(faults(capsys)) == {"OIDC_ISSUER_URL"}


def test_a_plain_service_needs_no_issuer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OIDC_ISSUER_URL")
    monkeypatch.delenv("OIDC_AUDIENCE")
    assert load(ServiceSettings).metrics_port == 9088


def test_loopback() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example.org", "127.0.0.1.example.org"):
        assert not is_loopback(host)
