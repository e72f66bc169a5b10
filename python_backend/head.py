"""Hidden states -> embeddings: pool, cut to each row's size, normalise; all in fp32."""

from torch import Tensor

from triton_embed.kernels import ops
from triton_embed.python_backend.batch import Batch


def embed(hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
    """hidden [T,E] -> fp32 [B,E]: L2 norm 1 over the first dims[b] values of row b, zeros after them."""
    return ops.segment_pool(hidden, batch.packed, pooling, batch.dims)
