"""The stores that core asks for, on Postgres: all SQL, beside its row mapping."""
