"""Kernel launches as on a GPU, with a fake kernel that records its calls."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from triton_embed.kernels.gpu import launch as launch_file
from triton_embed.kernels.gpu.launch import bound_count, launch


def _scale_kernel(x, y, count, SIZE: tl.constexpr, FACTOR: tl.constexpr): ...  # noqa: N803


class RecordingKernel(JITFunction):
    """A Triton kernel that records compilations, and returns bound kernels that record launches."""

    def __init__(self) -> None:
        super().__init__(_scale_kernel, do_not_specialize=["count"])
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def compile_and_start(*args: Any, **kwargs: Any) -> BoundKernel:
            self.compiled.append((grid, args, kwargs))
            return BoundKernel(self)

        return compile_and_start


class BoundKernel:
    def __init__(self, kernel: RecordingKernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args: self._kernel.launched.append((grid, args))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingKernel]:
    monkeypatch.setattr(launch_file, "_bound_kernels", {})
    return RecordingKernel()


def start(
    kernel: RecordingKernel, x: torch.Tensor | None = None, count: int = 3, size: int = 8, **options: int
) -> None:
    tensor = torch.zeros(8) if x is None else x
    launch(kernel, (2,), (tensor, None, count), {"SIZE": size, "FACTOR": 0.5}, **options)


def test_only_the_first_launch_compiles(kernel: RecordingKernel) -> None:
    x = torch.zeros(8)
    for count in (3, 1, 16, 1 << 30):  # values that Triton would specialize on
        start(kernel, x, count)
    ((grid, args, options),) = kernel.compiled
    assert (grid, args[0] is x, args[1:]) == ((2,), True, (None, 3))
    assert options == {"SIZE": 8, "FACTOR": 0.5, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    # A compiled kernel expects all parameters in order, including constants.
    assert [(grid, args[1:]) for grid, args in kernel.launched] == [
        ((2, 1, 1), (None, count, 8, 0.5)) for count in (1, 16, 1 << 30)
    ]
    assert bound_count() == 1


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(8).half()},
        {"size": 16},
        {"num_warps": 8},
        {"num_stages": 3},
    ],
    ids=["dtype", "size", "warps", "stages"],
)
def test_other_dtypes_sizes_and_options_compile_again(kernel: RecordingKernel, other: dict[str, Any]) -> None:
    start(kernel)
    start(kernel, **other)
    start(kernel, **other)
    assert (len(kernel.compiled), len(kernel.launched), bound_count()) == (2, 1, 2)


def test_tensor_in_place_of_none_compiles_again(kernel: RecordingKernel) -> None:
    x, constants = torch.zeros(8), {"SIZE": 8, "FACTOR": 0.5}
    launch(kernel, (2,), (x, None, 3), constants)
    launch(kernel, (2,), (x, x, 3), constants)
    assert len(kernel.compiled) == 2


def test_unaligned_tensor_is_rejected(kernel: RecordingKernel) -> None:
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        start(kernel, torch.zeros(9)[1:])


def test_constants_in_wrong_order_are_rejected(kernel: RecordingKernel) -> None:
    with pytest.raises(ValueError, match=r"takes the constants \['SIZE', 'FACTOR'\]"):
        launch(kernel, (2,), (torch.zeros(8), None, 3), {"FACTOR": 0.5, "SIZE": 8})
