"""GME-Qwen2-VL: vision tower and causal Qwen2 decoder, last-token pooling, every input in the chat template."""

from triton_embed.python_backend.serve import EmbeddingServer
from triton_embed.python_backend.spec import Qwen2VLSpec


class TritonPythonModel(EmbeddingServer):
    spec = Qwen2VLSpec()
    prompt = (
        "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{images}{text}<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )
