"""The orchestrator's gRPC controller: it owns Postgres and every resource in it."""
