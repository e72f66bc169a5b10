"""Linear layers in int8 on a CPU: weights rounded once with a scale an output, activations in each call with a scale a
token, so that what a text becomes does not depend on what it is computed with."""

from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS = 256  # at a time: the int32 and fp32 values between stay in a cache


@dataclass(frozen=True)
class Int8Weight:
    """A weight [N,K] for `linear`; it stands where the tensor does. `values` int8 [K,N], `scales` fp32 [N]."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype  # of what it was made from

    @classmethod
    def pack(cls, weight: Tensor) -> "Int8Weight":
        values, scales = _rounded(weight.float())
        return cls(values.t().contiguous(), scales.flatten(), weight.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.values.t().shape

    def fuses(self, act: str | None) -> bool:
        return act is None

    def linear(self, x: Tensor, bias: Tensor | None, act: str | None = None) -> Tensor:
        """x [T,K] -> x W^T + b [T,N], in the dtype of x."""
        y = torch.empty(len(x), self.values.shape[1], dtype=x.dtype)
        for start in range(0, len(x), TOKENS):
            values, scales = _rounded(x[start : start + TOKENS].float())
            out = y[start : start + TOKENS]
            products = torch._int_mm(values, self.values).float().mul_(scales)
            if bias is None:
                torch.mul(products, self.scales, out=out)
            else:
                out.copy_(products.mul_(self.scales).add_(bias))
        return y


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 [n,K] -> int8 [n,K] and what to multiply its rows by, fp32 [n,1]."""
    scales = x.abs().amax(dim=1, keepdim=True).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x / scales).round_().to(torch.int8), scales
