"""BGE: BERT encoder, CLS pooling as its checkpoint states, instruction before a query."""

from triton_embed.python_backend.serve import EmbeddingServer
from triton_embed.python_backend.spec import EncoderSpec


class TritonPythonModel(EmbeddingServer):
    spec = EncoderSpec()
    prompt = "{instruction}{text}"
