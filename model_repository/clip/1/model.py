"""CLIP: a text tower and a vision tower projected into one space, trained without instructions."""

from triton_embed.python_backend.serve import EmbeddingServer
from triton_embed.python_backend.spec import ClipSpec


class TritonPythonModel(EmbeddingServer):
    spec = ClipSpec()
