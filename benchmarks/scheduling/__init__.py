"""Scheduling benchmark of the whole stack."""
