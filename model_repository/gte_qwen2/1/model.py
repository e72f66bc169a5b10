"""GTE-Qwen2: Qwen2 decoder, causal or not as its config says, last-token pooling. Its network is not written yet."""

from triton_embed.python_backend.serve import EmbeddingServer


class TritonPythonModel(EmbeddingServer):
    prompt = "Instruct: {instruction}\nQuery: {text}"
