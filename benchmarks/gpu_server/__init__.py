"""Benchmark of the real server on a GPU machine."""
