"""The model families end to end, compared with transformers."""
