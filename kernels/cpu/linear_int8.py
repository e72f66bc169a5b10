"""int8 linear layers on a CPU.

Weights are quantized once, with one scale per output. Activations are quantized in each call, with one scale per token,
so that the vector of a text does not depend on the rest of its batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_TOKENS = 256  # per product, so that the int32 and fp32 intermediates stay in a cache


@dataclass(frozen=True)
class Int8Weight:
    """A quantized weight [N,K], used in place of the tensor. `values` int8 [K,N], `scales` fp32 [N]."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype  # of the original weight

    @classmethod
    def pack(cls, weight: Tensor) -> "Int8Weight":
        values, scales = _quantize(weight.float())
        return cls(values.t().contiguous(), scales.flatten(), weight.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.values.t().shape

    def fuses(self, act: str | None) -> bool:
        return act is None

    def linear(self, x: Tensor, bias: Tensor | None, act: str | None = None) -> Tensor:
        """Compute x W^T + b: [T,K] -> [T,N], in the dtype of x."""
        y = torch.empty(len(x), self.values.shape[1], dtype=x.dtype)
        for start in range(0, len(x), CHUNK_TOKENS):
            values, scales = _quantize(x[start : start + CHUNK_TOKENS].float())
            out = y[start : start + CHUNK_TOKENS]
            products = torch._int_mm(values, self.values).float().mul_(scales)
            if bias is None:
                torch.mul(products, self.scales, out=out)
            else:
                out.copy_(products.mul_(self.scales).add_(bias))
        return y


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x, fp32 [n,K], per row: int8 [n,K] and the scale of each row, fp32 [n,1]."""
    scales = x.abs().amax(dim=1, keepdim=True).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x / scales).round_().to(torch.int8), scales
