"""Tests that start the pair as processes, and kill them."""
