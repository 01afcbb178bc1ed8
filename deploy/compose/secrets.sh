#!/bin/sh
# Makes the secrets compose.yaml asks for, each a file under ./secrets, as random as it should be. What is there stays.
# Needs openssl. The folder is for its owner only; the files in it are readable, because containers run under other ids.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p secrets
chmod 700 secrets
cd secrets

new() { # name, value: written whole or not at all
    if [ ! -e "$1" ]; then
        printf '%s' "$2" > "$1.new"
        chmod 644 "$1.new"
        mv "$1.new" "$1"
        echo "made secrets/$1"
    fi
}

for name in postgres_password orchestrator_password redis_password PAGE_TOKEN_KEY KC_DB_PASSWORD \
    KC_BOOTSTRAP_ADMIN_PASSWORD AGENT_FINANCE_SECRET AGENT_MANAGER_SECRET ADA_PASSWORD GUS_PASSWORD; do
    new "$name" "$(openssl rand -hex 32)"
done
new DATABASE_URL "postgresql://orchestrator:$(cat orchestrator_password)@postgres:5432/orchestrator"
new REDIS_URL "redis://:$(cat redis_password)@redis:6379/0"
[ -e service_key.pem ] || rm -f service_public_key.pem # half of another pair
new service_key.pem "$(openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256)
"
new service_public_key.pem "$(openssl pkey -in service_key.pem -pubout)
"
