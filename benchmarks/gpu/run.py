"""State shared by all stages of the GPU benchmark: the device, the remaining time, and error handling per row."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.timing import Timer
from triton_embed.kernels.ops import Ops

Row = dict[str, Any]


@dataclass
class Run:
    """One run of the benchmark. `dry`: a dry run on a CPU with tiny sizes, whose figures mean nothing."""

    device: torch.device
    out: Path
    dry: bool
    timer: Timer
    deadline: float  # time.monotonic()
    results: dict[str, Any] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    @cached_property
    def ops(self) -> Ops:
        """Our kernels; in a dry run plain torch, which is as accurate as they must be."""
        return Ops.reference() if self.dry else Ops.on(self.device, torch.bfloat16)

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - time.monotonic()

    def size(self, real: int, dry: int) -> int:
        return dry if self.dry else real

    def free_memory(self) -> int:
        """Release cached device memory and return the free bytes on the device."""
        if self.device.type == "cpu":
            return 1 << 33
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])


def attempt(about: Row, measure: Callable[[], Row]) -> Row:
    """Return one row: the measurement, or the error that prevented it, so that the other rows still run."""
    try:
        return about | measure()
    except Exception as error:  # noqa: BLE001 - kernels, libraries and GPU memory can raise anything
        return about | {"error": f"{type(error).__name__}: {error}"[:600]}
