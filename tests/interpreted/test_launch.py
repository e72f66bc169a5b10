"""How kernels are started on a GPU, seen from a kernel that only writes down how it was called."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from triton_embed.kernels import launch as launch_file
from triton_embed.kernels.launch import bound, launch


def _scale_kernel(x, y, count, SIZE: tl.constexpr, FACTOR: tl.constexpr): ...  # noqa: N803


class Noted(JITFunction):
    """Triton's own kind of kernel; to compile it is to hand out an object that notes how it is launched."""

    def __init__(self) -> None:
        super().__init__(_scale_kernel, do_not_specialize=["count"])
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def compile_and_start(*args: Any, **kwargs: Any) -> Bound:
            self.compiled.append((grid, args, kwargs))
            return Bound(self)

        return compile_and_start


class Bound:
    def __init__(self, kernel: Noted) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args: self._kernel.launched.append((grid, args))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Noted]:
    monkeypatch.setattr(launch_file, "_bound", {})
    return Noted()


def start(kernel: Noted, x: torch.Tensor | None = None, count: int = 3, size: int = 8, **options: int) -> None:
    given = torch.zeros(8) if x is None else x
    launch(kernel, (2,), (given, None, count), {"SIZE": size, "FACTOR": 0.5}, **options)


def test_the_first_launch_compiles_and_the_others_do_not_ask_again(kernel: Noted) -> None:
    x = torch.zeros(8)
    for count in (3, 1, 16, 1 << 30):  # Triton would look at each of these
        start(kernel, x, count)
    ((grid, args, options),) = kernel.compiled
    assert (grid, args[0] is x, args[1:]) == ((2,), True, (None, 3))
    assert options == {"SIZE": 8, "FACTOR": 0.5, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    # All parameters in their order, constants too: what a compiled kernel expects.
    assert [(grid, args[1:]) for grid, args in kernel.launched] == [
        ((2, 1, 1), (None, count, 8, 0.5)) for count in (1, 16, 1 << 30)
    ]
    assert bound() == 1


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
def test_what_another_program_is_needed_for_compiles_again(kernel: Noted, other: dict[str, Any]) -> None:
    start(kernel)
    start(kernel, **other)
    start(kernel, **other)
    assert (len(kernel.compiled), len(kernel.launched), bound()) == (2, 1, 2)


def test_a_tensor_that_comes_where_none_was_compiles_again(kernel: Noted) -> None:
    x, constants = torch.zeros(8), {"SIZE": 8, "FACTOR": 0.5}
    launch(kernel, (2,), (x, None, 3), constants)
    launch(kernel, (2,), (x, x, 3), constants)
    assert len(kernel.compiled) == 2


def test_a_tensor_that_is_not_aligned_is_refused(kernel: Noted) -> None:
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        start(kernel, torch.zeros(9)[1:])


def test_constants_in_another_order_are_refused(kernel: Noted) -> None:
    with pytest.raises(ValueError, match=r"takes the constants \['SIZE', 'FACTOR'\]"):
        launch(kernel, (2,), (torch.zeros(8), None, 3), {"FACTOR": 0.5, "SIZE": 8})
