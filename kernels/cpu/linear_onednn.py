"""Linear layers on a CPU through oneDNN, with weights laid out once for its blocked kernels.

This is 2 to 3 times as fast as `torch.nn.functional.linear` on the CPUs measured, most of all for few tokens.
"""

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# Activation -> oneDNN's name and algorithm, for those that oneDNN has.
_EPILOGUES = {"gelu_erf": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
LARGE_BATCH_TOKENS = 512
_LINEAR = torch.ops.mkldnn._linear_pointwise.default


@cache
def supports(dtype: torch.dtype) -> bool:
    """Return whether this CPU has the instructions for a dtype."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def pack(weight: Tensor) -> Tensor:
    """Convert a weight [N,K] to oneDNN's own layout: an opaque tensor of the same shape that only `linear` reads.

    A weight in a dtype that this CPU does not support is returned unchanged.
    """
    if not supports(weight.dtype):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def fuses(act: str | None) -> bool:
    """Return whether `linear` applies this activation itself."""
    return act is None or act in _EPILOGUES


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    """Compute act(x W^T + b); see `Ops.linear`. `weight` comes from `pack`, and `fuses(act)` holds."""
    name, algorithm = _EPILOGUES.get(act, ("none", "")) if act else ("none", "")
    tokens = len(x)
    if weight.is_mkldnn and (padding := padding_tokens(tokens)):
        x = F.pad(x, (0, 0, 0, padding))
    y: Tensor = _LINEAR(x, weight, bias, name, [], algorithm)
    return y[:tokens]


def padding_tokens(tokens: int) -> int:
    """Return how many tokens of zeros to add, so that few different token counts reach oneDNN.

    oneDNN generates and keeps code for every token count it meets (MiniLM's layers: 6 MB, in 4 to 10 ms). Counts are
    therefore rounded up to four sizes per octave, which adds at most 3 tokens or a quarter (an eighth on average). From
    `LARGE_BATCH_TOKENS` on, padding costs more than the code, so counts are rounded up to eight sizes per octave, which
    adds half as much.
    """
    step = 1 << max(2, tokens.bit_length() - (4 if tokens >= LARGE_BATCH_TOKENS else 3))
    return -tokens % step
