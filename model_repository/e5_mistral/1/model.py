"""E5 on Mistral or Llama: causal decoder, last-token pooling, EOS appended. Its network is not written yet."""

from triton_embed.python_backend.serve import EmbeddingServer


class TritonPythonModel(EmbeddingServer):
    prompt = "Instruct: {instruction}\nQuery: {text}"
