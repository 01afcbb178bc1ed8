"""The rules: frozen dataclasses, state machines and pure mutations; only the standard library and `svckit.errors`."""
