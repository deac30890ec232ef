"""Measurements of msquant, side by side with what it is compared to; run them with `python -m benchmarks`."""
