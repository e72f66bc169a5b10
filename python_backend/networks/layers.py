"""Thin modules over the ops of `kernels.ops` that hold only parameters, under the checkpoint's names."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from triton_embed.kernels.ops import Ops


class Linear(nn.Module):
    """x [T,K] -> act(x W^T + b) [T,N]."""

    def __init__(self, ops: Ops, inputs: int, outputs: int, act: str | None = None, bias: bool = True) -> None:
        super().__init__()
        self._ops = ops
        self.weight: Any = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.act = act

    def pack(self, in_int8: bool = False) -> None:
        """Replace the loaded weight by one in the layout that the ops read fastest."""
        packed = self._ops.pack_linear(self.weight.data, in_int8)
        del self.weight
        self.weight = nn.Parameter(packed, requires_grad=False) if isinstance(packed, Tensor) else packed

    def forward(self, x: Tensor) -> Tensor:
        return self._ops.linear(x, self.weight, self.bias, self.act)


class FusedLinear(Linear):
    """Several projections of one input as one: tensors of these sizes, concatenated."""

    def __init__(self, ops: Ops, inputs: int, sizes: tuple[int, ...], bias: bool = True) -> None:
        super().__init__(ops, inputs, sum(sizes), bias=bias)
        self.sizes = sizes


class PatchEmbedding(Linear):
    """A convolution whose stride is its kernel, over extracted patches: [P, C*kernel] -> [P,N]."""

    def __init__(self, ops: Ops, kernel: tuple[int, ...], outputs: int) -> None:
        super().__init__(ops, 3 * math.prod(kernel), outputs, bias=False)
        self.weight = nn.Parameter(torch.empty(outputs, 3, *kernel))  # as in the checkpoint, until it is packed

    def pack(self, in_int8: bool = False) -> None:
        self.weight = nn.Parameter(self.weight.data.flatten(1), requires_grad=False)
        super().pack()  # never int8: few products, directly on pixels

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(1) if isinstance(self.weight, Tensor) and self.weight.dim() > 2 else self.weight
        return self._ops.linear(x, weight, None)


class Projection(Linear):
    """A projection of pooled vectors: always fp32, and never packed because it has few rows."""

    dtype = torch.float32

    def pack(self, in_int8: bool = False) -> None:
        """Do nothing."""


class LayerNorm(nn.Module):
    """LayerNorm of x + residual, and that sum. `rows` of the residual: see `Ops.add_rms_norm`.

    Its weights stay fp32: that costs nothing, and rounding them causes a third of MiniLM's error in bf16.
    """

    dtype = torch.float32

    def __init__(self, ops: Ops, size: int, eps: float) -> None:
        super().__init__()
        self._ops = ops
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps, rows)


class PostLayerNorm(LayerNorm):
    """LayerNorm of x + residual, as the output and as the next residual, for post-norm blocks."""

    def forward(self, x: Tensor, residual: Tensor | None = None, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._ops.post_layer_norm(x, residual, self.weight, self.bias, self.eps, rows)


class RMSNorm(nn.Module):
    """RMSNorm of x + residual, and that sum. `rows` of the residual: see `Ops.add_rms_norm`."""

    def __init__(self, ops: Ops, size: int, eps: float) -> None:
        super().__init__()
        self._ops = ops
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._ops.add_rms_norm(x, residual, self.weight, self.eps, rows)


class Table(nn.Module):
    """An embedding table [rows, E]: ids [T] -> [T,E]."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight)
