"""The local stack: Postgres, Valkey, a token issuer and both services as child processes."""
