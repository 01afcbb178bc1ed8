"""Thin gRPC servicers, one file per service: convert, call core, convert."""
