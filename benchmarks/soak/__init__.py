"""Soak test of the whole stack."""
