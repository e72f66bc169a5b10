"""bf16 linear layers on CPUs that multiply pairs of bf16 (avx512_bf16): one compiled loop with bias and activation.

A word is what one multiplication reads: an fp32 number, or a pair of bf16. A matrix of words [rows, columns] is stored
as panels of 32 neighboring columns: [columns/32, rows, 32]. Compared with oneDNN on two cores, the loop is as fast for
many tokens and 1.2 to 1.7 times as fast for up to 64. Unlike oneDNN, it needs no new code for a new token count.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from triton_embed.kernels.cpu.loops import Address, loop, pointer, scratch, thread_index, thread_range
from triton_embed.kernels.cpu.simd import LANES, exp2, inline, larger, load, splat, store, tile_product, transpose

PANEL = 2 * LANES  # columns
WORD_BYTES = 4
TILE_ROWS = 8  # tokens per tile
MAX_CHUNK_TOKENS = 256  # so few that their rows stay in a core's cache while every panel is read
ACTIVATIONS = (None, "gelu_erf", "gelu_tanh", "quick_gelu", "relu")  # that the loop applies; `act` is an index
_GELU_ERF, _GELU_TANH, _QUICK_GELU, _RELU = range(1, 5)


@cache
def is_preferred() -> bool:
    """Return whether this CPU multiplies pairs of bf16 but has no AMX, which oneDNN uses."""
    return bool(torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported())


@dataclass(frozen=True)
class PanelWeight:
    """A bf16 weight [N,K] in panels, used in place of the tensor. `panels` int32 [N/32,K/2,32]."""

    panels: Tensor
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def pack(cls, weight: Tensor) -> "PanelWeight | None":
        """Pack a weight, or return None if its dtype or sizes do not fit or oneDNN is faster on this CPU."""
        outputs, inputs = weight.shape
        if weight.dtype != torch.bfloat16 or outputs % PANEL or inputs % 2 or not is_preferred():
            return None
        panels = torch.empty(outputs // PANEL, inputs // 2, PANEL, dtype=torch.int32)
        _pack(weight.numel(), weight=weight, stride=weight.stride(0), outputs=outputs, inputs=inputs, panels=panels)
        return cls(panels)

    @property
    def shape(self) -> torch.Size:
        count, words, columns = self.panels.shape
        return torch.Size((count * columns, words * 2))

    def fuses(self, act: str | None) -> bool:
        return act in ACTIVATIONS

    def linear(self, x: Tensor, bias: Tensor | None, act: str | None = None) -> Tensor:
        """Compute act(x W^T + b) in bf16: [T,K] -> [T,N]."""
        tokens, (outputs, inputs) = len(x), self.shape
        y = x.new_empty(tokens, outputs)
        scratch_floats = TILE_ROWS * (PANEL + inputs // 2)
        _linear(
            16 * tokens * outputs,
            x=x,
            x_stride=x.stride(0),
            panels=self.panels,
            bias=bias,
            bias_itemsize=0 if bias is None else bias.itemsize,
            y=y,
            tokens=tokens,
            outputs=outputs,
            words=inputs // 2,
            act=ACTIVATIONS.index(act),
            memory=scratch(scratch_floats),
            thread_floats=scratch_floats,
        )
        return y


@inline
def copy_words(source, target, words):
    """Copy contiguous words."""
    x, y = pointer(source, np.uint32), pointer(target, np.uint32)
    for i in range(words):
        y[i] = x[i]


@inline
def transpose_to_panels(source, stride, tokens, words, target):
    """Transpose x [tokens,words], rows `stride` bytes apart, into panels. Columns past the last token are undefined."""
    full = words // LANES * LANES
    for j in range(0, tokens, LANES):
        panel = target + (j // PANEL * words * PANEL + j % PANEL) * WORD_BYTES
        for i in range(0, full, LANES):
            transpose(
                source + j * stride + i * WORD_BYTES,
                stride,
                tokens - j,
                panel + i * PANEL * WORD_BYTES,
                PANEL * WORD_BYTES,
            )
        for token in range(j, min(j + LANES, tokens)):
            x, y = pointer(source + token * stride, np.uint32), pointer(panel + (token - j) * WORD_BYTES, np.uint32)
            for i in range(full, words):
                y[i * PANEL] = x[i]


@loop
def _pack(weight: Address, stride: int, outputs: int, inputs: int, panels: Address) -> None:
    first, last = thread_range(outputs // PANEL)
    for panel in range(first, last):
        target = panels + panel * inputs // 2 * PANEL * WORD_BYTES
        transpose_to_panels(weight + panel * PANEL * stride * 2, stride * 2, PANEL, inputs // 2, target)


_product, _half_product = (tile_product(rows, PANEL // LANES, pairs=True) for rows in (TILE_ROWS, TILE_ROWS // 2))


@loop
def _linear(
    x: Address,
    x_stride: int,
    panels: Address,
    bias: Address,
    bias_itemsize: int,
    y: Address,
    tokens: int,
    outputs: int,
    words: int,
    act: int,
    memory: Address,
    thread_floats: int,
) -> None:
    stride = x_stride * 2  # bytes
    products = memory + thread_index() * thread_floats * 4  # [TILE_ROWS,PANEL]
    tail_rows = products + TILE_ROWS * PANEL * 4  # [TILE_ROWS,words]
    panel_count = outputs // PANEL
    chunks = (tokens + MAX_CHUNK_TOKENS - 1) // MAX_CHUNK_TOKENS
    # Chunks of similar size balance the threads.
    chunk_tokens = (tokens + chunks * TILE_ROWS - 1) // (chunks * TILE_ROWS) * TILE_ROWS
    first, last = thread_range(chunks * panel_count)
    for task in range(first, last):
        start, panel = task // panel_count * chunk_tokens, task % panel_count
        end = min(start + chunk_tokens, tokens)
        bias_low = bias_high = splat(np.float32(0))
        if bias:
            bias_low = load(bias + panel * PANEL * bias_itemsize, bias_itemsize)
            bias_high = load(bias + (panel * PANEL + LANES) * bias_itemsize, bias_itemsize)
        for token in range(start, end, TILE_ROWS):
            count = min(TILE_ROWS, end - token)
            rows, pitch = x + token * stride, stride
            if count < TILE_ROWS:  # memory past the last token may be unmapped
                for row in range(count):
                    copy_words(rows + row * stride, tail_rows + row * words * WORD_BYTES, words)
                rows, pitch = tail_rows, words * WORD_BYTES
            address = panels + panel * words * PANEL * WORD_BYTES
            if count > TILE_ROWS // 2:
                _product(rows, pitch, address, PANEL * WORD_BYTES, words, products, PANEL * 4)
            else:
                _half_product(rows, pitch, address, PANEL * WORD_BYTES, words, products, PANEL * 4)
            for row in range(count):
                address, target = products + row * PANEL * 4, y + ((token + row) * outputs + panel * PANEL) * 2
                store(_activate(load(address, 4) + bias_low, act), target, 2)
                store(_activate(load(address + LANES * 4, 4) + bias_high, act), target + LANES * 2, 2)


@inline
def _activate(x, act):
    if act == _GELU_ERF:
        return _gelu_erf(x)
    if act == _GELU_TANH:
        return _sigmoid_times(
            x, (x + x * x * x * splat(np.float32(0.044715))) * splat(np.float32(math.sqrt(8 / math.pi)))
        )
    if act == _QUICK_GELU:
        return _sigmoid_times(x, x * splat(np.float32(1.702)))
    if act == _RELU:
        return larger(x, splat(np.float32(0)))
    return x


@inline
def _sigmoid_times(x, y):
    """Compute x / (1 + e^-y)."""
    return x / (splat(np.float32(1)) + exp2(y * splat(np.float32(-math.log2(math.e)))))


@inline
def _gelu_erf(x):
    """Compute x (1 + erf(x / sqrt 2)) / 2, with erf within 2e-7 (Abramowitz and Stegun, 7.1.26)."""
    magnitude = larger(x, splat(np.float32(0)) - x)
    y = magnitude * splat(np.float32(math.sqrt(0.5)))
    t = splat(np.float32(1)) / (splat(np.float32(1)) + splat(np.float32(0.3275911)) * y)
    p = splat(np.float32(1.061405429)) * t + splat(np.float32(-1.453152027))
    p = p * t + splat(np.float32(1.421413741))
    p = p * t + splat(np.float32(-0.284496736))
    p = p * t + splat(np.float32(0.254829592))
    erf = splat(np.float32(1)) - p * t * exp2(y * y * splat(np.float32(-math.log2(math.e))))
    return splat(np.float32(0.5)) * (x + magnitude * erf)
