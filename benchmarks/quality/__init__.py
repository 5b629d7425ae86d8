"""How good each published way of choosing tiles is: `python -m benchmarks.quality`."""
