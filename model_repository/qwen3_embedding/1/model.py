"""Qwen3-Embedding: causal decoder, RMSNorm of each query and key head, last-token pooling."""

from triton_embed.python_backend.serve import EmbeddingServer
from triton_embed.python_backend.spec import DecoderSpec


class TritonPythonModel(EmbeddingServer):
    spec = DecoderSpec(causal=True, qk_norm=True, qkv_bias=False, eos="<|endoftext|>")
    prompt = "Instruct: {instruction}\nQuery:{text}"
