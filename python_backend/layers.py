"""Thin modules over kernels.ops: they hold parameters under the checkpoint's names and nothing else."""

import torch
from torch import Tensor, nn

from triton_embed.kernels import ops


class Linear(nn.Module):
    """x [T,K] -> act(x W^T + b) [T,N]."""

    def __init__(self, inputs: int, outputs: int, act: str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.act = act

    def pack(self) -> None:
        """Lay the loaded weight out for speed; the plain one is gone after that."""
        self.weight = nn.Parameter(ops.pack_linear(self.weight.data), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self.act)


class AddLayerNorm(nn.Module):
    """LayerNorm of x + residual."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class Table(nn.Module):
    """An embedding table [rows, E]; whoever owns it looks things up."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))
