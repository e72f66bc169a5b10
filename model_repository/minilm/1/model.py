"""MiniLM and similar models: BERT encoder, pooling of the checkpoint, trained without instructions."""

from triton_embed.python_backend.serve import EmbeddingServer
from triton_embed.python_backend.spec import EncoderSpec


class TritonPythonModel(EmbeddingServer):
    spec = EncoderSpec()
