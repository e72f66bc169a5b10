"""Test support for compiled kernels: Triton's own path from a call to a launch, with a driver that launches nothing.

Kernels are compiled for Hopper as on a GPU, on tensors in ordinary memory. Run these tests in a process of their own,
without TRITON_INTERPRET.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from triton_embed.kernels.gpu import blocks, launch

assert not triton.knobs.runtime.interpret, "Unset TRITON_INTERPRET: these tests compile kernels"

KINDS: dict[str, type] = {"i32": int, "i64": int, "fp32": float}


class Launcher:
    """Checks the arguments of a launch against the signature of the kernel, and does nothing."""

    def __init__(self, source: Any, _: Any) -> None:
        self._names = source.fn.arg_names
        self._signature = source.signature

    def __call__(self, *args: Any) -> None:
        values = args[9:]  # after the grid, the stream, the function, metadata and hooks
        assert len(values) == len(self._names), f"{len(values)} arguments for {self._names}"
        for name, value in zip(self._names, values, strict=True):
            kind = self._signature[name]
            if kind.startswith("*"):
                assert isinstance(value, torch.Tensor), f"{name} is {kind}, got {value!r}"
            elif kind in KINDS:
                assert isinstance(value, KINDS[kind]), f"{name} is {kind}, got {value!r}"


class Driver:
    """The driver of a Hopper GPU."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda *_: (object(), 0, 64, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 232_448, "multiprocessor_count": 132},
        unload_module=lambda *_: None,
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch on a Hopper GPU, with the block sizes of its table. Nothing is compiled before the test."""
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(blocks, "table_for", lambda _: blocks.load_table("sm90"))
    monkeypatch.setattr(launch, "_bound_kernels", {})
