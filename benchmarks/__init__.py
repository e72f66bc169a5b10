"""Benchmarks behind docs/benchmarks.md. Each command writes a JSON file with hardware and versions to results/."""
