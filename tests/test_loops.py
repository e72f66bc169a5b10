"""Compiled loops on torch's threads, and the rows they read and write."""

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from triton_embed.kernels.cpu import loops
from triton_embed.kernels.cpu.loops import (
    MIN_THREAD_ELEMENTS,
    Address,
    add,
    loop,
    pointer,
    read,
    scratch,
    thread_count,
    thread_index,
    thread_range,
    write,
)
from triton_embed.kernels.cpu.norm import add_rms_norm

COUNTS = range(41)
OFFSETS = (0, 1, 5)  # elements before a row, so that its registers are not aligned
DTYPES = (torch.float32, torch.bfloat16)
GARBAGE = 0x5A  # fills memory that must not be written
PAGE = mmap.PAGESIZE


@loop
def _visit(visits: Address, count: int, threads: Address, counts: Address) -> None:
    begin, end = thread_range(count)
    for i in range(begin, end):
        pointer(visits, np.int64)[i] += 1
        pointer(threads, np.int64)[i] = thread_index()
    pointer(counts, np.int64)[thread_index()] += thread_count()


@loop
def _store_arguments(
    integers: Address,
    absent: Address,
    i: int,
    j: int,
    k: int,
    x: Address,
    y: Address,
    fractions: Address,
    p: float,
    q: float,
    r: float,
    s: float,
    t: float,
) -> None:
    out = pointer(integers, np.int64)
    out[0], out[1], out[2], out[3], out[4], out[5] = absent, i, j, k, x, y
    out = pointer(fractions, np.float64)
    out[0], out[1], out[2], out[3], out[4] = p, q, r, s, t


@loop
def _rows(kind: int, row: Address, itemsize: int, x: Address, count: int) -> None:
    if kind == 0:
        read(row, itemsize, x, count)
    elif kind == 1:
        add(row, itemsize, x, count)
    else:
        write(x, row, itemsize, count)


@pytest.fixture(autouse=True)
def restored_thread_count() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def before_guard_page(x: Tensor) -> Tensor:
    """Copy x to the end of a readable page, so that reading past it crashes the process."""
    size = -(-x.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, size + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(PAGE), 0) == 0
    copied = torch.frombuffer(memory, dtype=x.dtype, offset=size - x.nbytes, count=x.numel()).view(x.shape)
    return copied.copy_(x)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_split_the_range_evenly(count: int) -> None:
    torch.set_num_threads(count)
    for size in range(51):
        visits, owners, seen = torch.zeros(size + 1).long(), torch.full((size + 1,), -1), torch.zeros(4).long()
        _visit(count * MIN_THREAD_ELEMENTS, visits=visits, count=size, threads=owners, counts=seen)
        assert visits.tolist() == [1] * size + [0]
        assert seen.tolist() == [count] * count + [0] * (4 - count)
        assert owners[:size].tolist() == sorted(owners[:size].tolist())
        shares = owners[:size].bincount(minlength=count)
        assert shares.max() - shares.min() <= 1


@pytest.mark.parametrize(
    ("work", "used"),
    [
        (0, 1),
        (1, 1),
        (MIN_THREAD_ELEMENTS, 1),
        (2 * MIN_THREAD_ELEMENTS - 1, 1),
        (2 * MIN_THREAD_ELEMENTS, 2),
        (3 * MIN_THREAD_ELEMENTS, 3),
        (10**15, 3),
    ],
)
def test_little_work_uses_few_threads(work: int, used: int) -> None:
    torch.set_num_threads(3)
    seen = torch.zeros(4).long()
    _visit(work, visits=seen, count=0, threads=seen, counts=seen)
    assert seen.tolist() == [used] * used + [0] * (4 - used)


def test_none_becomes_address_0_and_numbers_are_exact() -> None:
    integers, fractions = torch.full((6,), -7), torch.zeros(5).double()
    x = torch.zeros(3)
    floats = (0.1, -2.5, float("inf"), 5e-324, -1e300)
    fixed = {"absent": None, "i": -1, "j": 2**62, "k": -(2**63), "x": x, "y": x[1:]}
    _store_arguments(0, integers=integers, fractions=fractions, **fixed, **dict(zip("pqrst", floats, strict=True)))
    assert integers.tolist() == [0, -1, 2**62, -(2**63), x.data_ptr(), x.data_ptr() + 4]
    assert fractions.numpy().tobytes() == np.array(floats).tobytes()


def test_float_argument_may_be_integral_in_the_next_call() -> None:
    integers, fractions = torch.zeros(6).long(), torch.zeros(5).double()
    for floats in ((1.5, 2.5, 3.5, 4.5, 5.5), (1.0, 2.0, 3.0, -4.0, 0.0)):
        fixed = {"absent": None, "i": 1, "j": 2, "k": 3, "x": None, "y": None}
        _store_arguments(0, integers=integers, fractions=fractions, **fixed, **dict(zip("pqrst", floats, strict=True)))
        assert fractions.tolist() == list(floats)


def place_in_garbage(x: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Copy a row into memory filled with garbage; return the whole memory and the row."""
    memory = torch.full((512,), GARBAGE, dtype=torch.uint8)
    row = memory.view(x.dtype)[16 + offset :][: len(x)]
    row.copy_(x)
    return memory, row


def assert_surroundings_unchanged(memory: Tensor, row: Tensor) -> None:
    rest = memory.clone()
    rest.view(row.dtype)[row.storage_offset() :][: len(row)] = 0
    rest.view(row.dtype)[row.storage_offset() :][: len(row)].view(torch.uint8).fill_(GARBAGE)
    assert (rest == GARBAGE).all()


def numbers(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count + 100 * seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_read_pads_with_zeros(offset: int, dtype: torch.dtype) -> None:
    for count in COUNTS:
        values, padded = numbers(count, dtype), loops.padded_count(count)
        assert padded % 16 == 0
        assert 0 <= padded - count < 16
        source, row = place_in_garbage(values, offset)
        target, x = place_in_garbage(torch.full((padded,), 7.0), 0)
        _rows(0, kind=0, row=row, itemsize=dtype.itemsize, x=x, count=count)
        assert torch.equal(x[:count], values.float())
        assert not x[count:].any()
        assert torch.equal(row, values)
        assert_surroundings_unchanged(source, row)
        assert_surroundings_unchanged(target, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_add_changes_only_the_row(offset: int, dtype: torch.dtype) -> None:
    for count in COUNTS:
        values, before = numbers(count, dtype), numbers(count, torch.float32, seed=1)
        source, row = place_in_garbage(values, offset)
        target, x = place_in_garbage(before, 0)
        _rows(0, kind=1, row=row, itemsize=dtype.itemsize, x=x, count=count)
        assert torch.equal(x, before + values.float())
        assert torch.equal(row, values)
        assert_surroundings_unchanged(source, row)
        assert_surroundings_unchanged(target, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_write_rounds_and_changes_only_the_row(offset: int, dtype: torch.dtype) -> None:
    for count in COUNTS:
        values = numbers(count, torch.float32)
        target, row = place_in_garbage(torch.zeros(count, dtype=dtype), offset)
        source, x = place_in_garbage(values, 0)
        _rows(0, kind=2, row=row, itemsize=dtype.itemsize, x=x, count=count)
        assert torch.equal(row, values.to(dtype))
        assert torch.equal(x, values)
        assert_surroundings_unchanged(target, row)
        assert_surroundings_unchanged(source, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_read_past_the_end_of_a_row(dtype: torch.dtype) -> None:
    x = torch.zeros(64)
    for count in COUNTS:
        row = before_guard_page(numbers(count, dtype)) if count else torch.empty(0, dtype=dtype)
        for kind in (0, 1, 2):
            _rows(0, kind=kind, row=row, itemsize=dtype.itemsize, x=x, count=count)


EDGES = {  # edge cases of rounding to bf16
    "ties": (0x3F808000, 0x3F818000, 0xBF808000, 0x00008000, 0x80018000),
    "denormals": (0x00000001, 0x00007FFF, 0x00008001, 0x807FFFFF),
    "largest": (0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF),
    "inf": (0x7F800000, 0xFF800000),
    "nan": (0x7FC00000, 0xFFC00000),
    "nan written by a GPU": (0x7FFFFFFF,),
    "nan with other bits": (0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FFF8000),
}


@pytest.mark.parametrize("bits", EDGES.values(), ids=EDGES)
def test_rounding_is_the_same_inside_and_after_registers(bits: tuple[int, ...]) -> None:
    for pattern in bits:
        values = torch.from_numpy(np.full(21, pattern, np.uint32).view(np.float32))
        result, expected = torch.zeros(21).bfloat16(), values.bfloat16()
        _rows(0, kind=2, row=result, itemsize=2, x=values, count=21)
        assert torch.equal(result.isnan(), expected.isnan()), f"{pattern:#x} -> {result.tolist()}"
        if not expected.isnan().any():
            assert torch.equal(result.view(torch.int16), expected.view(torch.int16))


def test_scratch_grows_and_is_reused() -> None:
    torch.set_num_threads(2)
    small = scratch(10)
    assert small.dtype == torch.float32
    assert small.numel() >= 20
    size = small.numel() + 1
    large = scratch(size)
    assert large.numel() >= 2 * size
    assert scratch(10).data_ptr() == scratch(size).data_ptr() == large.data_ptr()
    torch.set_num_threads(3)
    assert scratch(size).numel() >= 3 * size


def test_scratch_is_fp32_whatever_the_default_dtype() -> None:
    size = scratch(1).numel() + 1
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            memory = scratch(size)
    finally:
        torch.set_default_dtype(before)
        loops._thread_local.__dict__.clear()
    assert memory.dtype == torch.float32
    assert memory.device.type == "cpu"


def test_each_python_thread_has_separate_scratch() -> None:
    with ThreadPoolExecutor(1) as pool:
        other_scratch = pool.submit(scratch, 100).result()
    assert other_scratch.data_ptr() != scratch(100).data_ptr()


def test_concurrent_python_threads_do_not_interfere() -> None:
    torch.set_num_threads(2)
    weight = torch.ones(300)
    inputs = [numbers(300 * 8000, torch.float32, seed).view(8000, 300) for seed in range(2)]
    expected = [add_rms_norm(x, x, weight, 1e-6) for x in inputs]
    barrier = threading.Barrier(2)

    def repeat(i: int) -> bool:
        torch.set_num_threads(2)
        barrier.wait(10)
        results = (add_rms_norm(inputs[i], inputs[i], weight, 1e-6) for _ in range(10))
        return all(torch.equal(y, expected[i][0]) and torch.equal(total, expected[i][1]) for y, total in results)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(repeat, range(2)))


def double(x: Address) -> None:
    values = pointer(x, np.float32)
    values[0] = values[0] + values[0]


def runs(body: Callable[..., None]) -> bool:
    x = torch.tensor([21.0])
    loop(body)(0, x=x)
    return x.tolist() == [42.0]


def test_loop_works_without_a_source_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile a function without a source file, although Numba caches a function by its file."""
    monkeypatch.setattr(double, "__code__", double.__code__.replace(co_filename="<nowhere>"))
    assert runs(double)


def test_loop_works_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    assert runs(double)


@pytest.mark.parametrize("ending", ["nbc", "nbi"])
def test_loop_works_with_a_damaged_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str) -> None:
    """Truncate a cache file, as after a crash while it was written, and change one byte of its code at a time."""
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    assert runs(double)
    (cached,) = tmp_path.rglob(f"*.{ending}")
    whole = cached.read_bytes()
    damaged = [whole[:100], b"", b"text", bytes(len(whole))]
    for i in range(len(whole) // 3, len(whole), len(whole) // 3):
        damaged.append(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
    for content in damaged:
        cached.write_bytes(content)
        assert runs(double)
        assert cached.read_bytes() != content  # compiled again


def test_cache_that_others_may_write_to_is_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    assert runs(double)
    assert runs(double)  # from the cache
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    Path(loops.config.CACHE_DIR).chmod(0o777)
    assert runs(double)
    assert f"others may write to {loops.config.CACHE_DIR}" in caplog.text


GATE = """
import logging

import torch

logging.basicConfig(level=logging.INFO)
from triton_embed.kernels.cpu import activation

print(activation.gated_activation(torch.full((1, 4), 4.0))[0, 0].item())
"""


def run_processes(kernels: Path, cache: Path, code: str, count: int = 1) -> list[tuple[float, str]]:
    """Run `code` in processes that import a copy of the kernels; return the number each prints, and its log."""
    environment = {**os.environ, "PYTHONPATH": str(kernels), "NUMBA_CACHE_DIR": str(cache)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=kernels, text=True, **pipes)
        for _ in range(count)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * count, outputs
    return [(float(number), log) for number, log in outputs]


def test_missing_or_unknown_argument_is_a_type_error() -> None:
    x = torch.ones(1)
    with pytest.raises(TypeError, match="count"):
        _rows(0, kind=0, row=x, itemsize=4, x=x)
    with pytest.raises(TypeError, match="size"):
        _rows(0, kind=0, row=x, itemsize=4, x=x, count=1, size=2)


def test_one_process_compiles_until_an_inlined_function_changes(tmp_path: Path) -> None:
    copy = tmp_path / "triton_embed" / "kernels"
    shutil.copytree(Path(loops.__file__).parent.parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    cache = tmp_path / "cache"
    expected = 4 / (1 + np.exp(-4)) * 4

    processes = run_processes(tmp_path, cache, GATE, 2)
    assert [number for number, _ in processes] == pytest.approx([expected] * 2, rel=1e-6)
    logs = "".join(log for _, log in processes)
    assert (logs.count("Compiled the loop"), logs.count("Loaded the loop")) == (1, 1)

    with (copy / "cpu" / "simd.py").open("a") as file:  # inlined into the loops of other files
        file.write("\n\n@inline\ndef exp2(x):\n    return splat(np.float32(3))\n")
    ((number, log),) = run_processes(tmp_path, cache, GATE)
    assert number == 4.0
    assert "Compiled the loop" in log
