"""GTE-Qwen2: Qwen2 decoder, causal or bidirectional as config.json says, last-token pooling."""

from triton_embed.python_backend.serve import EmbeddingServer
from triton_embed.python_backend.spec import DecoderSpec


class TritonPythonModel(EmbeddingServer):
    spec = DecoderSpec(causal=None, qk_norm=False, qkv_bias=True, eos="<|endoftext|>")
    prompt = "Instruct: {instruction}\nQuery: {text}"
