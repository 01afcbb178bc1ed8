"""The load benchmark: what the pair does in a second, beside a bare echo and beside Postgres alone, in one table."""
