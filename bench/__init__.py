"""Benchmarks and measurements: speed, and what the compiled kernels cost."""
