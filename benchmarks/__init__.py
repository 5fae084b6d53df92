"""Benchmarks that anyone can run: `python -m benchmarks.attention`, `.memory`, `.models`; cpu.sh and gpu.sh run all."""
