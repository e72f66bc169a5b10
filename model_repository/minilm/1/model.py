"""MiniLM and its kind: BERT encoder, pooled as its checkpoint states, trained without instructions."""

from triton_embed.python_backend.serve import EmbeddingServer
from triton_embed.python_backend.spec import EncoderSpec


class TritonPythonModel(EmbeddingServer):
    spec = EncoderSpec()
