"""CLIP: text and vision towers projected into one space. Its network is not written yet."""

from triton_embed.python_backend.serve import EmbeddingServer


class TritonPythonModel(EmbeddingServer):
    prompt = None
