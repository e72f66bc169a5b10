"""How far a kernel is from float64 on the same inputs, and how far it may be."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# Relative error by Frobenius norm; a single row may have four times as much.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
ROW_FACTOR = 4
# No more than so many times torch's own error in that dtype, or one rounding, or an eighth of the tolerance.
OWN_FACTOR, OWN_FLOOR = 1.5, 1 / 8

Found = Tensor | tuple[Tensor, ...]


def judge(found: Found, exact: Found, own: Found, dtype: torch.dtype) -> dict[str, Any]:
    """`found` against `exact` (float64), each a tensor or several; `own` is plain torch's in the same dtype."""
    worst, row, torch_worst = 0.0, 0.0, 0.0
    for one, truth, plain in zip(_each(found), _each(exact), _each(own), strict=True):
        if one.shape != truth.shape:
            return {"right": False, "reason": f"shape {tuple(one.shape)}, not {tuple(truth.shape)}"}
        worst = _greater(worst, _relative(one, truth))
        row = _greater(row, _rows(one, truth))
        torch_worst = _greater(torch_worst, _relative(plain, truth))
    limit = TOLERANCE[dtype]
    allowed = min(limit, max(OWN_FACTOR * torch_worst, torch.finfo(dtype).eps / 2, OWN_FLOOR * limit))
    right = worst <= allowed and row <= ROW_FACTOR * limit  # false for NaN
    return {"right": right, "error_to_exact": worst, "worst_row": row, "torch_error": torch_worst, "allowed": allowed}


def exact(call: Callable[..., Found], *inputs: Any) -> Found:
    """The call on its inputs in float64, with the statistics, which plain torch takes in fp32, in float64 too."""
    to_fp32 = Tensor.float
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    with patch.object(Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_fp32(x)):
        return call(*wide)


def _each(found: Found) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


def _greater(a: float, b: float) -> float:
    """The greater, NaN above all."""
    return b if b != b or b > a else a


def _relative(x: Tensor, truth: Tensor) -> float:
    truth = truth.double()
    return float((x.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def _rows(x: Tensor, truth: Tensor) -> float:
    truth = truth.double().flatten(1) if truth.dim() > 1 else truth.double()[:, None]
    error = (x.double().reshape(truth.shape) - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-30)
    return float(error.max())
