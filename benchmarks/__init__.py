"""Benchmarks behind docs/benchmarks.md: one folder per suite, and at the top what the suites share.

Each command, `python -m benchmarks.<suite>`, writes a JSON file with hardware and versions to results/.
"""
