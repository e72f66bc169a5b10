"""E5-Mistral and similar models: causal Mistral or Llama decoder, last-token pooling, texts that end with EOS."""

from triton_embed.python_backend.serve import EmbeddingServer
from triton_embed.python_backend.spec import DecoderSpec


class TritonPythonModel(EmbeddingServer):
    spec = DecoderSpec(causal=True, qk_norm=False, qkv_bias=False, eos="eos_token")
    prompt = "Instruct: {instruction}\nQuery: {text}"
