"""Benchmark of the gateway with a model that computes nothing."""
