"""Benchmarks that anyone can run: `python -m benchmarks.attention` and `python -m benchmarks.models`."""
