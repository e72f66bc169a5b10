"""Throughput as a share of the machine's ceiling."""
