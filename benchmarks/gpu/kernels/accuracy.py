"""Accuracy of a kernel: its error relative to float64 on the same inputs, and the allowed error."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# Relative error in the Frobenius norm; the limit for a single row is ROW_FACTOR times higher.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
ROW_FACTOR = 4

Outputs = Tensor | tuple[Tensor, ...]


def judge(outputs: Outputs, exact: Outputs, torch_outputs: Outputs, dtype: torch.dtype) -> dict[str, Any]:
    """Compare a kernel's outputs with the exact ones and with plain torch's.

    Args:
        outputs: The kernel's output, a tensor or a tuple of tensors.
        exact: The same in float64.
        torch_outputs: The same from plain torch in `dtype`.
        dtype: The dtype of the kernel's inputs; selects the tolerance.

    Returns:
        "right", and either "reason" or the errors and the allowed error.
    """
    worst, row, torch_worst = 0.0, 0.0, 0.0
    for output, truth, plain in zip(_each(outputs), _each(exact), _each(torch_outputs), strict=True):
        if output.shape != truth.shape:
            return {"right": False, "reason": f"shape {tuple(output.shape)}, expected {tuple(truth.shape)}"}
        worst = _greater(worst, _relative(output, truth))
        row = _greater(row, _worst_row(output, truth))
        torch_worst = _greater(torch_worst, _relative(plain, truth))
    limit = TOLERANCE[dtype]
    right = worst <= limit and row <= ROW_FACTOR * limit  # false for NaN
    return {"right": right, "error_to_exact": worst, "worst_row": row, "torch_error": torch_worst, "allowed": limit}


def exact(call: Callable[..., Outputs], *inputs: Any) -> Outputs:
    """Run the call on its inputs in float64, including the statistics that plain torch computes in fp32."""
    to_fp32 = Tensor.float
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    with patch.object(Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_fp32(x)):
        return call(*wide)


def _each(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _greater(a: float, b: float) -> float:
    """Return the greater value; NaN counts as greatest."""
    return b if b != b or b > a else a


def _relative(x: Tensor, truth: Tensor) -> float:
    truth = truth.double()
    return float((x.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def _worst_row(x: Tensor, truth: Tensor) -> float:
    truth = truth.double().flatten(1) if truth.dim() > 1 else truth.double()[:, None]
    error = (x.double().reshape(truth.shape) - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-30)
    return float(error.max())
