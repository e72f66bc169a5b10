"""Requests of the soak with the checks of their responses."""
