"""Linear layers on a CPU through oneDNN, with the weight laid out once for its blocked kernels.

On the CPUs measured this is 2 to 3 times as fast as `torch.nn.functional.linear`, most of all for few tokens.
"""

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# Our activation -> oneDNN's name and algorithm for it, where it has one.
_EPILOGUES = {"gelu_erf": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
LARGE = 512  # tokens
_LINEAR = torch.ops.mkldnn._linear_pointwise.default


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this CPU has the instructions for a dtype."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def pack(weight: Tensor) -> Tensor:
    """weight [N,K] on a CPU in oneDNN's own layout: an opaque tensor of the same shape, for `linear` alone.

    Where `packs` says no, the weight as it is.
    """
    if not packs(weight.dtype):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def fuses(act: str | None) -> bool:
    """Whether `linear` applies this activation itself."""
    return act is None or act in _EPILOGUES


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    """See `ops.linear`; weight comes from `pack`, act is one that it fuses."""
    name, algorithm = _EPILOGUES.get(act, ("none", "")) if act else ("none", "")
    tokens = len(x)
    if weight.is_mkldnn and (added := filler_count(tokens)):
        x = F.pad(x, (0, 0, 0, added))
    y: Tensor = _LINEAR(x, weight, bias, name, [], algorithm)
    return y[:tokens]


def filler_count(tokens: int) -> int:
    """How many tokens of zeros to add: up to 3, up to a quarter (an eighth on average), or to many half of that.

    For every number of tokens that it ever met oneDNN keeps 6 MB of code for MiniLM's layers, which it takes 4 to 10 ms
    to make, so the numbers are rounded up to four an octave, and to eight from `LARGE` on, where what is added costs
    more than that.
    """
    step = 1 << max(2, tokens.bit_length() - (4 if tokens >= LARGE else 3))
    return -tokens % step
