"""BGE: BERT or XLM-RoBERTa encoder, pooling of the checkpoint (CLS), instruction before a query."""

from triton_embed.python_backend.serve import EmbeddingServer
from triton_embed.python_backend.spec import EncoderSpec


class TritonPythonModel(EmbeddingServer):
    spec = EncoderSpec()
    prompt = "{instruction}{text}"
