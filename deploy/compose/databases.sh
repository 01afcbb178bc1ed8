#!/bin/sh
# Run once by the Postgres image, over a new data directory: a database and its owner for the pair, and for Keycloak.
set -eu

create() { # the name of both, the file with the password
    NAME=$1 PASSWORD_FILE=$2 psql --username "$POSTGRES_USER" --dbname postgres --no-psqlrc --quiet --set ON_ERROR_STOP=1 <<'END'
\getenv name NAME
\set password `cat "$PASSWORD_FILE"`
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE CONNECT ON DATABASE :"name" FROM PUBLIC;
END
}

create orchestrator "${SECRETS_DIR:-/run/secrets}/orchestrator_password"
create keycloak "${SECRETS_DIR:-/run/secrets}/KC_DB_PASSWORD"
