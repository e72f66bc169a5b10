"""Functions that several Triton kernels share: a layout check, and fp32 functions of values in registers."""

import triton
import triton.language as tl
from torch import Tensor


def row_stride(x: Tensor) -> int:
    """Return the number of elements from one row of `x` to the next.

    Raises:
        ValueError: The last dimension is not contiguous.
    """
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"The last dimension of a tensor {tuple(x.shape)} is not contiguous: strides {x.stride()}")
    return x.stride(0)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """Apply one of `ops.ACTIVATIONS` to fp32 values."""
    if KIND == "gelu_erf":
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif KIND == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "tanh":
        y = _tanh(x)
    else:
        tl.static_assert(KIND == "none", "unknown activation")
        y = x
    return y


@triton.jit
def _tanh(x):
    """Compute tanh. Near 0, 2 * sigmoid(2 * x) - 1 has no correct digits, so use the polynomial of Cephes' tanhf."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)
