"""Checks and times on a GPU in one command: `python -m benchmarks.gpu`."""
