"""Gated activations on a CPU, as a compiled loop over rows."""

import math

import numpy as np
from torch import Tensor

from triton_embed.kernels.cpu.loops import (
    Address,
    loop,
    padded_count,
    read,
    scratch,
    thread_index,
    thread_range,
    write,
)
from triton_embed.kernels.cpu.simd import LANES, exp2, load, splat, store


@loop
def _gate(
    gate_up: Address, itemsize: int, stride: int, y: Address, count: int, width: int, memory: Address, padded_width: int
) -> None:
    gate = memory + thread_index() * 2 * padded_width * 4
    up = gate + padded_width * 4
    unit, minus_log2_e = splat(np.float32(1)), splat(np.float32(-math.log2(math.e)))
    begin, end = thread_range(count)
    for row in range(begin, end):
        address = gate_up + row * stride * itemsize
        read(address, itemsize, gate, width)
        read(address + width * itemsize, itemsize, up, width)
        for i in range(0, width, LANES):
            x = load(gate + i * 4, 4)
            store(x / (unit + exp2(x * minus_log2_e)) * load(up + i * 4, 4), gate + i * 4, 4)
        write(gate, y + row * width * itemsize, itemsize, width)


def gated_activation(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up; see `Ops.gated_activation`."""
    count, width = len(gate_up), gate_up.shape[1] // 2
    y = gate_up.new_empty(count, width)
    padded_width = padded_count(width)
    _gate(
        2 * count * width,
        gate_up=gate_up,
        itemsize=gate_up.itemsize,
        stride=gate_up.stride(0),
        y=y,
        count=count,
        width=width,
        memory=scratch(2 * padded_width),
        padded_width=padded_width,
    )
    return y
