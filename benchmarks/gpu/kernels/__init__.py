"""Accuracy and speed of every op, and the search for block sizes."""
