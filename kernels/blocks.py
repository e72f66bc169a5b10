"""Block sizes: one JSON file an architecture in `tables/`, written by `python -m benchmarks.gpu --tune`.

They are looked up, never searched for: a request must not wait for a compiler.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

DIRECTORY = Path(__file__).with_name("tables")
# Compute capability, without its last digit -> the table made for it. 12 (consumer Blackwell) has Ampere's matrix
# instructions and as little shared memory as the least of them.
ARCHITECTURES = {8: "sm80", 9: "sm90", 10: "sm100", 12: "sm80"}


@dataclass(frozen=True)
class Config:
    """The shape of one launch: a block of M x N values, K of them at a time; warps, and stages of the pipeline."""

    block_m: int = 1
    block_n: int = 1
    block_k: int = 1
    num_warps: int = 4
    num_stages: int = 1


class Table:
    """Every choice for one architecture: kernel -> entries, of which the first whose `up_to` all hold counts.

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
        # Tokens differ from batch to batch: what is remembered of them is bounded.
        self._remembered = lru_cache(maxsize=4096)(self._find)

    def config(self, kernel: str, **sizes: int) -> Config:
        """The choice for a kernel at these sizes. LookupError: the table has none, in a sentence."""
        found = self.choice(kernel, **sizes)
        if found is None:
            raise LookupError(f"the table of {self.architecture} has no '{kernel}' for {sizes}")
        return found

    def choice(self, kernel: str, **sizes: int) -> Config | None:
        """The same; None: the table says to leave it to torch."""
        return self._remembered(kernel, **sizes)

    def limits(self, kernel: str, size: str) -> list[int]:
        """The values of a size up to which an entry of a kernel goes."""
        return sorted({most[size] for most, _ in self.kernels.get(kernel, ()) if size in most})

    def _find(self, kernel: str, **sizes: int) -> Config | None:
        for most, config in self.kernels.get(kernel, ()):
            if all(sizes[name] <= limit for name, limit in most.items()):
                return config
        return None


@cache
def of(device: torch.device) -> Table:
    """The table for a device; the smallest blocks for a CPU, where only the interpreter reads it.

    LookupError: none was made for this one.
    """
    if device.type == "cpu":
        return table("sm80")
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or major not in ARCHITECTURES:
        name = torch.cuda.get_device_name(device)
        raise LookupError(f"the kernels were never tried on {name} (compute capability {major}.{minor})")
    return table(ARCHITECTURES[major])


@cache
def table(architecture: str) -> Table:
    """One file of `tables/`."""
    return Table(architecture, json.loads((DIRECTORY / f"{architecture}.json").read_text()))
