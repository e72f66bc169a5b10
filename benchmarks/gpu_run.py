"""What every stage of the GPU benchmark is given: the device, the time that is left, and one way to fail."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timing import Timer

Row = dict[str, Any]


@dataclass
class Run:
    """`dry`: a rehearsal on a CPU with tiny sizes, whose figures mean nothing."""

    device: torch.device
    out: Path
    dry: bool
    timer: Timer
    deadline: float  # time.monotonic()
    results: dict[str, Any] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def size(self, real: int, dry: int) -> int:
        return dry if self.dry else real

    def free_memory(self) -> int:
        """Bytes left on the device."""
        if self.device.type == "cpu":
            return 1 << 33
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])


def attempt(about: Row, measure: Callable[[], Row]) -> Row:
    """One row: what is measured, or why it could not be, so that the others go on."""
    try:
        return about | measure()
    except Exception as error:  # noqa: BLE001 - whatever a kernel, a library or the memory of a GPU can raise
        return about | {"error": f"{type(error).__name__}: {error}"[:600]}
