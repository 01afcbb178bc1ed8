"""The fast path of idempotency: it owns Redis, and to it an answer is opaque bytes."""
