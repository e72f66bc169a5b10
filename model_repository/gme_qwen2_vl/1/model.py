"""GME-Qwen2-VL: vision tower and Qwen2 decoder, last-token pooling. Its network is not written yet."""

from triton_embed.python_backend.serve import EmbeddingServer


class TritonPythonModel(EmbeddingServer):
    prompt = None
