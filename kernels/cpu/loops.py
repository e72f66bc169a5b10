"""Loops over memory on a CPU, compiled by Numba and run on torch's own threads.

Between matrix products torch passes over memory once per operation; a compiled loop passes once for all of them and
rounds once. A loop receives addresses and sizes. It reads and writes rows of fp32 or bf16 and computes in fp32.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import pickle
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from inspect import signature
from pathlib import Path
from typing import Any, NewType

import numpy as np
import torch
from llvmlite import binding, ir
from numba import cfunc, config, types
from numba.extending import intrinsic
from torch import Tensor

from triton_embed.kernels.cpu.simd import LANES, inline, load, store

log = logging.getLogger(__name__)

MIN_THREAD_ELEMENTS = 16_384  # of `work` per thread; with fewer, another thread costs more time than it saves

# The OpenMP runtime that torch loaded. A second runtime would start more threads, which spin while they wait.
_OPENMP = ctypes.CDLL(torch._C.__file__)
for _name in ("omp_get_thread_num", "omp_get_num_threads"):
    binding.add_symbol(_name, ctypes.cast(_OPENMP[_name], ctypes.c_void_p).value)
_parallel = _OPENMP["GOMP_parallel"]  # GCC's entry point; Intel's and LLVM's runtimes have it too
_parallel.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint)
_parallel.restype = None
_omp_thread_index = types.ExternalFunction("omp_get_thread_num", types.int32())
_omp_thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
_thread_local = threading.local()


Address = NewType("Address", int)  # of a tensor's memory; 0 for None


def loop(body: Callable[..., None]) -> Callable[..., None]:
    """Return a function that runs `body`, compiled, on each thread.

    Its first argument, `work`, determines how many threads run: the number of elements to process, scaled where an
    element takes more or less time than usual. The others are the parameters of the body by keyword. A parameter
    annotated `Address` takes a tensor or None, `int` an integer, `float` a float.
    """
    kinds = {parameter.name: parameter.annotation for parameter in signature(body).parameters.values()}
    layout = struct.Struct("".join("d" if kind is float else "q" for kind in kinds.values()))
    expressions = [
        f"0 if {name} is None else {name}.data_ptr()" if kind is Address else name for name, kind in kinds.items()
    ]
    # Generated, because packing 18 arguments in a generic function takes longer than a short query's loop.
    source = f"def {body.__name__}(work, *, {', '.join(kinds)}): run(work, pack({', '.join(expressions)}))"
    run = _Compiled(body, list(kinds.values())).run
    return _define(source, body, run=run, pack=layout.pack)


class _Compiled:
    """The body of a loop, compiled on its first run as a C function.

    The function's one parameter points to the arguments of the body, 8 bytes each.
    """

    def __init__(self, body: Callable[..., None], kinds: list[type]) -> None:
        self._body = body
        self._kinds = kinds

    def run(self, work: int, arguments: bytes) -> None:
        used_threads = max(1, min(torch.get_num_threads(), work // MIN_THREAD_ELEMENTS))
        _parallel(self._address, arguments, used_threads, 0)

    @cached_property
    def _address(self) -> int:
        began = time.monotonic()
        expressions = [f"float_argument(a[{i}])" if kind is float else f"a[{i}]" for i, kind in enumerate(self._kinds)]
        source = f"def {self._body.__name__}(a): body({', '.join(expressions)})"
        entry = _define(source, self._body, body=inline(self._body), float_argument=float_argument)
        c_signature = types.void(types.CPointer(types.int64))
        try:
            _set_cache_directory()
            with _locked_cache(self._body):
                compiled = cfunc(c_signature, cache=True, error_model="numpy")(entry)
        except (RuntimeError, OSError, EOFError, pickle.PickleError) as error:
            log.warning("Cannot cache compiled loops for the next start: %s", error or type(error).__name__)
            compiled = cfunc(c_signature, error_model="numpy")(entry)
        done = "Loaded" if compiled.cache_hits else "Compiled"
        log.info("%s the loop %s in %.1f s", done, self._body.__name__, time.monotonic() - began)
        address: int = compiled.address
        return address


def _define(source: str, like: Callable[..., None], **names: object) -> Callable[..., None]:
    """Return the function that `source` defines, with `names` as its globals.

    Its name, module and file are those of `like`, because Numba caches by them.
    """
    namespace: dict[str, Any] = {"__name__": like.__module__, **names}
    exec(compile(source, like.__code__.co_filename, "exec"), namespace)  # noqa: S102 - made of the body's own signature
    function: Callable[..., None] = namespace[like.__name__]
    return function


@cache
def _set_cache_directory() -> None:
    """Set Numba's cache directory to one named after a hash of all kernel sources.

    Numba considers a cached loop current if the loop's own file has not changed, but a loop also contains code of the
    other files. The directory is in NUMBA_CACHE_DIR if that is set, else in `__pycache__`, or in
    `~/.cache/triton-embed` if `__pycache__` is not writable.
    """
    kernels = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(kernels.glob("*.py")))
    pycache = kernels / "__pycache__"
    base = Path(
        config.CACHE_DIR or (pycache if os.access(pycache, os.W_OK) else Path.home() / ".cache" / "triton-embed")
    )
    config.CACHE_DIR = str(base / f"loops-{hashlib.sha256(sources).hexdigest()[:16]}")


@contextmanager
def _locked_cache(body: Callable[..., None]) -> Iterator[None]:
    """Let one process at a time compile a loop. Those that waited, often one per model, find it in the cache.

    The lock file has a hash of the loop's files, because Numba runs machine code even if a bad disk has changed it.
    Files with another hash are removed.

    Raises:
        OSError: The cache directory is not writable, or not for this user alone: what is read from it is run.
    """
    directory = Path(config.CACHE_DIR)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"others may write to {directory}")
    files = f"*/{Path(body.__code__.co_filename).stem}.{body.__qualname__}-*.nb?"
    with (directory / f"{body.__module__}.{body.__name__}.lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if file.read() != _hash(directory.glob(files)):
            for path in directory.glob(files):
                path.unlink()
        yield
        file.truncate(0)
        file.write(_hash(directory.glob(files)))


def _hash(files: Iterable[Path]) -> str:
    """Return a hash of the names and contents of files."""
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sorted(files))).hexdigest()


def scratch(floats: int) -> Tensor:
    """Return scratch memory, `floats` fp32 numbers per thread, valid until the calling thread runs its next loop."""
    size = torch.get_num_threads() * floats
    memory: Tensor | None = getattr(_thread_local, "scratch", None)
    if memory is None or memory.numel() < size:
        _thread_local.scratch = memory = torch.empty(size, dtype=torch.float32, device="cpu")
    return memory


def padded_count(count: int) -> int:
    """Round a count of numbers up to whole registers."""
    return -(-count // LANES) * LANES


@intrinsic
def pointer(_, address, kind):
    """Convert an address to a pointer to elements of a dtype."""
    result = types.CPointer(kind.dtype)
    return result(types.int64, kind), lambda context, b, _, args: b.inttoptr(args[0], context.get_value_type(result))


@intrinsic
def float_argument(_, bits):
    """Convert the bits of a loop argument back to the float that was passed."""
    return types.float64(types.int64), lambda _, b, __, args: b.bitcast(args[0], ir.DoubleType())


@intrinsic
def _to_bits(_, x):
    return types.uint32(types.float32), lambda _, b, __, args: b.bitcast(args[0], ir.IntType(32))


@intrinsic
def _from_bits(_, x):
    return types.float32(types.uint32), lambda _, b, __, args: b.bitcast(args[0], ir.FloatType())


@inline
def thread_index():
    return np.int64(_omp_thread_index())


@inline
def thread_count():
    return np.int64(_omp_thread_count())


@inline
def thread_range(count):
    """Return the first and last + 1 of this thread's part of 0 … count - 1."""
    return count * thread_index() // thread_count(), count * (thread_index() + 1) // thread_count()


@inline
def read(address, itemsize, x, count):
    """Read the elements at an address into x as fp32, followed by zeros up to a whole register."""
    full = count // LANES * LANES
    for i in range(0, full, LANES):
        store(load(address + i * itemsize, itemsize), x + i * 4, 4)
    values = pointer(x, np.float32)
    for i in range(full, count):
        values[i] = _load_element(address + i * itemsize, itemsize)
    if full < count:
        for i in range(count, full + LANES):
            values[i] = np.float32(0)


@inline
def add(address, itemsize, x, count):
    """Add the elements at an address to x."""
    full = count // LANES * LANES
    for i in range(0, full, LANES):
        store(load(x + i * 4, 4) + load(address + i * itemsize, itemsize), x + i * 4, 4)
    values = pointer(x, np.float32)
    for i in range(full, count):
        values[i] += _load_element(address + i * itemsize, itemsize)


@inline
def write(x, address, itemsize, count):
    """Write x to the elements at an address, rounded to their dtype."""
    full = count // LANES * LANES
    for i in range(0, full, LANES):
        store(load(x + i * 4, 4), address + i * itemsize, itemsize)
    values = pointer(x, np.float32)
    for i in range(full, count):
        if itemsize == 2:
            bits = _to_bits(values[i])
            if values[i] != values[i]:
                bits |= np.uint32(0x400000)  # NaN stays NaN
            else:
                bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            pointer(address, np.uint16)[i] = np.uint16(bits >> np.uint32(16))
        else:
            pointer(address, np.float32)[i] = values[i]


@inline
def _load_element(address, itemsize):
    if itemsize == 2:
        return _from_bits(np.uint32(pointer(address, np.uint16)[0]) << np.uint32(16))
    return pointer(address, np.float32)[0]
