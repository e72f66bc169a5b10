"""Loops over memory on a CPU, compiled by Numba and run on torch's own threads.

Between products torch goes through memory once for each operation; a loop goes through it once for all of them, and
rounds once. Loops get addresses and sizes; rows that they read and write are fp32 or bf16, and fp32 in between.
"""

import ctypes
import hashlib
import logging
import os
import pickle
import struct
import threading
import time
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import cfunc, config, types
from numba.extending import intrinsic
from torch import Tensor

from triton_embed.kernels.simd import COUNT, helper, load, store

log = logging.getLogger(__name__)

GRAIN = 16_384  # elements that a thread should have: below it a second one costs more than it takes over

# Of whatever OpenMP torch brought along: a second one would have threads of its own, which wait by spinning.
_OPENMP = ctypes.CDLL(torch._C.__file__)
for _name in ("omp_get_thread_num", "omp_get_num_threads"):
    binding.add_symbol(_name, ctypes.cast(_OPENMP[_name], ctypes.c_void_p).value)
_parallel = _OPENMP["GOMP_parallel"]  # GCC's name, which Intel's and LLVM's have too
_parallel.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint)
_parallel.restype = None
_thread = types.ExternalFunction("omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
_kept = threading.local()


class Loop:
    """Calls `body` on each thread with an array of int64: what `__call__` was given, tensors as their addresses and
    fractions as the bits of a float64 (see `fraction`)."""

    def __init__(self, body: Callable[[Any], None]) -> None:
        self._body = body
        self._layout: struct.Struct | None = None

    def __call__(self, work: int, *given: Tensor | float | None) -> None:
        """`work`: how many elements there are to go through. A tensor that is None has the address 0. What is a
        fraction in one call must be one in all."""
        if self._layout is None:
            self._layout = struct.Struct("".join("d" if isinstance(x, float) else "q" for x in given))
        numbers = [x.data_ptr() if isinstance(x, Tensor) else 0 if x is None else x for x in given]
        count = max(1, min(torch.get_num_threads(), work // GRAIN))
        _parallel(self._address, self._layout.pack(*numbers), count, 0)

    @cached_property
    def _address(self) -> int:
        began = time.monotonic()
        signature = types.void(types.CPointer(types.int64))
        try:
            _choose_cache()
            compiled = cfunc(signature, cache=True, error_model="numpy")(self._body)
        except (RuntimeError, OSError, EOFError, pickle.PickleError) as error:
            log.warning("loops cannot be kept for the next start: %s", type(error).__name__)
            compiled = cfunc(signature, error_model="numpy")(self._body)
        log.info("the loop %s is ready after %.1f s", self._body.__name__, time.monotonic() - began)
        address: int = compiled.address
        return address


@cache
def _choose_cache() -> None:
    """Numba looks at the file of a loop alone to tell whether it is the one it kept, but loops are made of these files
    together: what they were is in the name of the folder. It lies beside Python's own, or where users keep theirs."""
    folder = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    own = folder / "__pycache__"
    place = Path(config.CACHE_DIR or (own if os.access(own, os.W_OK) else Path.home() / ".cache" / "triton-embed"))
    config.CACHE_DIR = str(place / f"loops-{hashlib.sha256(sources).hexdigest()[:16]}")


def scratch(floats: int) -> Tensor:
    """So many fp32 for each thread that a loop of the calling thread runs on, until its next loop."""
    wanted = torch.get_num_threads() * floats
    kept: Tensor | None = getattr(_kept, "scratch", None)
    if kept is None or kept.numel() < wanted:
        _kept.scratch = kept = torch.empty(wanted, dtype=torch.float32, device="cpu")
    return kept


def whole(count: int) -> int:
    """Numbers in the registers that hold so many."""
    return -(-count // COUNT) * COUNT


@intrinsic
def pointer(_, address, kind):
    """An address -> a pointer to elements of a dtype."""
    to = types.CPointer(kind.dtype)
    return to(types.int64, kind), lambda context, b, _, given: b.inttoptr(given[0], context.get_value_type(to))


@intrinsic
def fraction(_, bits):
    """The fraction that was given to a loop."""
    return types.float64(types.int64), lambda _, b, __, given: b.bitcast(given[0], ir.DoubleType())


@intrinsic
def _bits(_, x):
    return types.uint32(types.float32), lambda _, b, __, given: b.bitcast(given[0], ir.IntType(32))


@intrinsic
def _of_bits(_, x):
    return types.float32(types.uint32), lambda _, b, __, given: b.bitcast(given[0], ir.FloatType())


@helper
def thread():
    return np.int64(_thread())


@helper
def threads():
    return np.int64(_threads())


@helper
def share(count):
    """First and last + 1 of this thread's part of 0 … count - 1."""
    return count * thread() // threads(), count * (thread() + 1) // threads()


@helper
def read(address, size, x, count):
    """x = the elements at an address, in fp32, and 0 up to a whole number of registers."""
    full = count // COUNT * COUNT
    for i in range(0, full, COUNT):
        store(load(address + i * size, size), x + i * 4, 4)
    into = pointer(x, np.float32)
    for i in range(full, count):
        into[i] = _element(address + i * size, size)
    if full < count:
        for i in range(count, full + COUNT):
            into[i] = np.float32(0)


@helper
def add(address, size, x, count):
    """x += the elements at an address."""
    full = count // COUNT * COUNT
    for i in range(0, full, COUNT):
        store(load(x + i * 4, 4) + load(address + i * size, size), x + i * 4, 4)
    into = pointer(x, np.float32)
    for i in range(full, count):
        into[i] += _element(address + i * size, size)


@helper
def write(x, address, size, count):
    """x to the elements at an address."""
    full = count // COUNT * COUNT
    for i in range(0, full, COUNT):
        store(load(x + i * 4, 4), address + i * size, size)
    found = pointer(x, np.float32)
    for i in range(full, count):
        if size == 2:
            bits = _bits(found[i])
            if found[i] != found[i]:
                bits |= np.uint32(0x400000)  # a NaN stays one
            else:
                bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            pointer(address, np.uint16)[i] = np.uint16(bits >> np.uint32(16))
        else:
            pointer(address, np.float32)[i] = found[i]


@helper
def _element(address, size):
    if size == 2:
        return _of_bits(np.uint32(pointer(address, np.uint16)[0]) << np.uint32(16))
    return pointer(address, np.float32)[0]
