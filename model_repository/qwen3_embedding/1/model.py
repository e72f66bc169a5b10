"""Qwen3-Embedding: causal decoder, q/k RMSNorm a head, last-token pooling. Its network is not written yet."""

from triton_embed.python_backend.serve import EmbeddingServer


class TritonPythonModel(EmbeddingServer):
    prompt = "Instruct: {instruction}\nQuery:{text}"
