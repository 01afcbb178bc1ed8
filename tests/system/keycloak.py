"""A real Keycloak with the realm of deploy/keycloak: got through Maven once, started for a module, gone after it."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from deploy.local.processes import LOOPBACK, ROOT, Child, free_port

VERSION = "26.4.0"
REALM_FILE = ROOT / "deploy" / "keycloak" / "orchestrator-realm.json"

_ARTIFACT = f"org.keycloak:keycloak-quarkus-dist:{VERSION}:zip"
_ZIP_SHA256 = "1b6a11a2726ac8a8dc9c91d5fafe989a75ce4f1622d7f7b45c21d5bc16629c0a"
_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy"
_FOLDER = ROOT / ".local" / "keycloak"


class KeycloakMissing(Exception):
    """Keycloak cannot be had on this machine; the message says what is missing."""


class TokenRefused(Exception):
    """The issuer gave no token; the message is its answer."""


@dataclass(frozen=True, slots=True)
class Keycloak:
    """A running Keycloak and its realm.

    issuer: the realm's URL, exactly as in `iss`. secrets: the values of the realm file's placeholders, by their names
    (AGENT_FINANCE_SECRET, ADA_PASSWORD, …), made for this run.
    """

    issuer: str
    secrets: Mapping[str, str] = field(repr=False)

    def by_password(self, user: str, *, client: str = "orchestrator-cli") -> dict[str, str]:
        """A user's tokens from a public client: access_token, id_token and refresh_token."""
        password = self.secrets[f"{user.upper()}_PASSWORD"]
        return self._tokens(grant_type="password", client_id=client, username=user, password=password, scope="openid")

    def by_client(self, client: str) -> str:
        """The access token of a confidential client's own service account."""
        secret = self.secrets[f"{client.upper().replace('-', '_')}_SECRET"]
        return self._tokens(grant_type="client_credentials", client_id=client, client_secret=secret)["access_token"]

    def refreshed(self, refresh_token: str, *, client: str = "orchestrator-cli") -> dict[str, str]:
        """New tokens for a refresh token, which is used up by that."""
        return self._tokens(grant_type="refresh_token", client_id=client, refresh_token=refresh_token)

    def change_account(self, access_token: str, profile: Mapping[str, object]) -> tuple[int, str]:
        """What a user's own change of their profile is answered: HTTP status and body."""
        headers = {"Authorization": f"Bearer {access_token}", "Content-Type": "application/json"}
        return _answer("POST", f"{self.issuer}/account/", json.dumps(profile), headers)

    def _tokens(self, **form: str) -> dict[str, str]:
        url = f"{self.issuer}/protocol/openid-connect/token"
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        status, body = _answer("POST", url, urlencode(form), headers)
        if status != 200:
            raise TokenRefused(f"{status} {body}")
        return {name: value for name, value in json.loads(body).items() if name.endswith("_token")}


@contextmanager
def keycloak() -> Iterator[Keycloak]:
    """A Keycloak on a free loopback port with the realm imported, its database in memory, stopped at the end.

    Raises KeycloakMissing when it cannot be had, LocalError when it does not start.
    """
    home = _installed()
    port = free_port()
    issuer = f"http://{LOOPBACK}:{port}/realms/orchestrator"
    values = {name: secrets.token_urlsafe(18) for name in placeholders()}
    with tempfile.TemporaryDirectory(prefix="keycloak-") as run:
        own_home = Path(run) / "home"
        # All that it writes goes under its home: one of its own, so that runs beside each other do not meet.
        (own_home / "data" / "import").mkdir(parents=True)
        for part in ("bin", "conf", "lib", "providers", "themes"):
            (own_home / part).symlink_to(home / part)
        shutil.copy(REALM_FILE, own_home / "data" / "import")
        command = ["sh", str(home / "bin" / "kc.sh"), f"-Dkc.home.dir={own_home}", "start-dev", "--import-realm"]
        command += ["--db=dev-mem", f"--http-host={LOOPBACK}", f"--http-port={port}"]
        # A short life is not worth the second compiler's work: a third less CPU.
        environment = {**os.environ, **values, "JAVA_OPTS_APPEND": "-XX:TieredStopAtLevel=1"}
        server = Child("Keycloak", command, log=Path(run) / "log", env=environment)
        server.start()
        try:
            server.wait_until(lambda: _is_up(issuer), seconds=180)
            yield Keycloak(issuer, values)
        finally:
            server.stop(seconds=15)


def placeholders() -> list[str]:
    """The names of the environment variables the realm file takes its secrets from.

    An unset one would be imported as it stands, `${…}`, for a secret.
    """
    realm = json.loads(REALM_FILE.read_text())
    values = [client.get("secret", "") for client in realm["clients"]]
    values += [credential["value"] for user in realm["users"] for credential in user.get("credentials", ())]
    return [value[2:-1] for value in values if value]


def _installed() -> Path:
    """The unpacked distribution; got and unpacked first if it is not there yet."""
    if shutil.which("java") is None:
        raise KeycloakMissing("Keycloak needs java, which is not installed")
    home = _FOLDER / f"keycloak-{VERSION}"
    if home.is_dir():
        return home
    if shutil.which("mvn") is None:
        raise KeycloakMissing(f"Keycloak {VERSION} is got by Maven: mvn is not installed")
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
        archive = _archive(Path(folder))
        if hashlib.sha256(archive.read_bytes()).hexdigest() != _ZIP_SHA256:
            raise RuntimeError(f"{_ARTIFACT} is not the one that was tried: its SHA-256 differs")
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)
        try:
            (Path(folder) / home.name).rename(home)
        except OSError:
            if not home.is_dir():  # else another run was first
                raise
    return home


def _archive(folder: Path) -> Path:
    """The distribution's zip, copied into `folder` from Maven's own store or, the first time, from Maven Central."""
    command = ["mvn", "-B", "-q", _COPY, f"-Dartifact={_ARTIFACT}", f"-DoutputDirectory={folder}"]
    copied = subprocess.run(command, capture_output=True, text=True, check=False)
    if copied.returncode != 0:
        raise KeycloakMissing(f"mvn could not get {_ARTIFACT}: {(copied.stdout + copied.stderr).strip()[:400]}")
    return folder / f"keycloak-quarkus-dist-{VERSION}.zip"


def _is_up(issuer: str) -> bool:
    try:
        return _answer("GET", issuer)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _answer(
    method: str, url: str, body: str | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Status and body of an HTTP request; no proxy is asked, whatever http_proxy says."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30)
    with closing(connection):
        connection.request(method, parts.path, body, {**(headers or {}), "Accept": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
