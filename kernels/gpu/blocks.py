"""Block sizes: one JSON file per GPU architecture in `tables/`, written by `python -m benchmarks.gpu --tune`.

They are looked up and never tuned while serving, because a request must not wait for a compiler.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

DIRECTORY = Path(__file__).with_name("tables")
# Major compute capability -> table. 12 (consumer Blackwell) has Ampere's matrix instructions and as little shared
# memory as the smallest Ampere GPUs.
ARCHITECTURES = {8: "sm80", 9: "sm90", 10: "sm100", 12: "sm80"}


@dataclass(frozen=True)
class Config:
    """Parameters of one launch: a block of M x N values computed K at a time, warps, and pipeline stages."""

    block_m: int = 1
    block_n: int = 1
    block_k: int = 1
    num_warps: int = 4
    num_stages: int = 1


class Table:
    """Block sizes for one architecture: kernel -> entries. The first entry whose `up_to` limits all hold applies.

    An entry without a config leaves those sizes to torch.
    """

    def __init__(self, architecture: str, kernels: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.architecture = architecture
        self.kernels = {
            name: [
                (entry.get("up_to", {}), Config(**entry["config"]) if entry.get("config") else None)
                for entry in entries
            ]
            for name, entries in kernels.items()
        }
        # Bounded, because token counts differ from batch to batch.
        self._cached_find = lru_cache(maxsize=4096)(self._find)

    def config(self, kernel: str, **sizes: int) -> Config:
        """Return the config for a kernel at these sizes.

        Raises:
            LookupError: The table has none.
        """
        config = self.find_config(kernel, **sizes)
        if config is None:
            raise LookupError(f"The block size table of {self.architecture} has no entry for '{kernel}' at {sizes}")
        return config

    def find_config(self, kernel: str, **sizes: int) -> Config | None:
        """Return the config for a kernel at these sizes, or None if the table leaves them to torch."""
        return self._cached_find(kernel, **sizes)

    def limits(self, kernel: str, size: str) -> list[int]:
        """Return the limits that the entries of a kernel set on one size, in ascending order."""
        return sorted({limits[size] for limits, _ in self.kernels.get(kernel, ()) if size in limits})

    def _find(self, kernel: str, **sizes: int) -> Config | None:
        for limits, config in self.kernels.get(kernel, ()):
            if all(sizes[name] <= limit for name, limit in limits.items()):
                return config
        return None


@cache
def table_for(device: torch.device) -> Table:
    """Return the table for a device. A CPU, where only Triton's interpreter uses it, gets the smallest blocks.

    Raises:
        LookupError: No table covers this device.
    """
    if device.type == "cpu":
        return load_table("sm80")
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or major not in ARCHITECTURES:
        name = torch.cuda.get_device_name(device)
        raise LookupError(f"The Triton kernels do not support {name} (compute capability {major}.{minor})")
    return load_table(ARCHITECTURES[major])


@cache
def load_table(architecture: str) -> Table:
    """Load one file of `tables/`."""
    return Table(architecture, json.loads((DIRECTORY / f"{architecture}.json").read_text()))
