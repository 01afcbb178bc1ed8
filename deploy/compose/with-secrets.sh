#!/bin/sh
# Runs a command with every secret that is named like a variable as that variable: the file's name is the variable's,
# its first line the value. A variable that is set already stays as it is. Builtins only: not every image has cat.
set -eu
for file in "${SECRETS_DIR:-/run/secrets}"/*; do
    name=${file##*/}
    case $name in
        *[!A-Z0-9_]* | [!A-Z]*) continue ;;
    esac
    if eval "[ -z \"\${$name+set}\" ]"; then
        value=
        IFS= read -r value < "$file" || [ -n "$value" ]
        export "$name=$value"
    fi
done
exec "$@"
