"""The head: pools hidden states, projects, truncates to each row's dimensions and normalizes, in fp32."""

from collections.abc import Sequence

from torch import Tensor, nn

from triton_embed.kernels.ops import POOLING_MODES, Ops
from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.checkpoint.config import ModelConfig
from triton_embed.python_backend.networks.layers import Projection


class Head(nn.Module):
    """hidden [T,E] of B rows -> fp32 [B,F]: L2 norm 1 over the first dims[b] values of row b, zeros after them."""

    def __init__(self, ops: Ops, model: ModelConfig) -> None:
        super().__init__()
        self._ops = ops
        # With any other pooling, such as CLIP's, the network returns one state per row, which "cls" keeps as it is.
        self._pooling = model.pooling if model.pooling in POOLING_MODES else "cls"
        self.dense = nn.Sequential(
            *(Dense(ops, d.in_features, d.out_features, d.activation, d.bias) for d in model.dense)
        )

    def forward(self, hidden: Tensor, packed: Packed, dims: Sequence[int]) -> Tensor:
        return self._ops.segment_pool(hidden, packed, self._pooling, dims, self.dense if len(self.dense) else None)


class Dense(nn.Module):
    """sentence-transformers' Dense module."""

    def __init__(self, ops: Ops, inputs: int, outputs: int, act: str | None, bias: bool) -> None:
        super().__init__()
        self.linear = Projection(ops, inputs, outputs, act, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y
