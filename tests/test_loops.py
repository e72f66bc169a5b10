"""Loops on torch's threads, and the rows that they read and write."""

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
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from triton_embed.kernels import loops, rows
from triton_embed.kernels.loops import GRAIN, Loop, add, fraction, pointer, read, scratch, share, thread, threads, write

COUNTS = range(41)
OFFSETS = (0, 1, 5)  # elements in front of a row: no register of it is aligned
DTYPES = (torch.float32, torch.bfloat16)
RUBBISH = 0x5A  # every byte that nobody may write
PAGE = mmap.PAGESIZE


@Loop
def _visit(a: Any) -> None:
    begin, end = share(a[1])
    for i in range(begin, end):
        pointer(a[0], np.int64)[i] += 1
        pointer(a[2], np.int64)[i] = thread()
    pointer(a[3], np.int64)[thread()] += threads()


@Loop
def _given(a: Any) -> None:
    out = pointer(a[0], np.int64)
    for i in range(6):
        out[i] = a[i + 1]
    fractions = pointer(a[7], np.float64)
    for i in range(5):
        fractions[i] = fraction(a[8 + i])


@Loop
def _rows(a: Any) -> None:
    if a[0] == 0:
        read(a[1], a[2], a[3], a[4])
    elif a[0] == 1:
        add(a[1], a[2], a[3], a[4])
    else:
        write(a[3], a[1], a[2], a[4])


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def fenced(x: Tensor) -> Tensor:
    """The same numbers right before memory that nobody may read: who does ends the process."""
    room = -(-x.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, room + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(PAGE), 0) == 0
    found = torch.frombuffer(memory, dtype=x.dtype, offset=room - x.nbytes, count=x.numel()).view(x.shape)
    return found.copy_(x)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_thread_has_its_share_exactly_once(count: int) -> None:
    torch.set_num_threads(count)
    for size in range(51):
        visits, owners, seen = torch.zeros(size + 1).long(), torch.full((size + 1,), -1), torch.zeros(4).long()
        _visit(count * GRAIN, visits, size, owners, seen)
        assert visits.tolist() == [1] * size + [0]
        assert seen.tolist() == [count] * count + [0] * (4 - count)
        assert owners[:size].tolist() == sorted(owners[:size].tolist())
        shares = owners[:size].bincount(minlength=count)
        assert shares.max() - shares.min() <= 1


@pytest.mark.parametrize(
    ("work", "taken"), [(0, 1), (1, 1), (GRAIN, 1), (2 * GRAIN - 1, 1), (2 * GRAIN, 2), (3 * GRAIN, 3), (10**15, 3)]
)
def test_little_work_takes_few_threads(work: int, taken: int) -> None:
    torch.set_num_threads(3)
    seen = torch.zeros(4).long()
    _visit(work, seen, 0, seen, seen)
    assert seen.tolist() == [taken] * taken + [0] * (4 - taken)


def test_none_is_address_0_and_numbers_arrive_as_they_are() -> None:
    found, fractions = torch.full((6,), -7), torch.zeros(5).double()
    x = torch.zeros(3)
    floats = (0.1, -2.5, float("inf"), 5e-324, -1e300)
    _given(0, found, None, -1, 2**62, -(2**63), x, x[1:], fractions, *floats)
    assert found.tolist() == [0, -1, 2**62, -(2**63), x.data_ptr(), x.data_ptr() + 4]
    assert fractions.numpy().tobytes() == np.array(floats).tobytes()


def test_a_fraction_may_be_another_one_and_whole_in_the_next_call() -> None:
    found, fractions = torch.zeros(6).long(), torch.zeros(5).double()
    for floats in ((1.5, 2.5, 3.5, 4.5, 5.5), (1.0, 2.0, 3.0, -4.0, 0.0)):
        _given(0, found, *range(6), fractions, *floats)
        assert fractions.tolist() == list(floats)


def surrounded(x: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """A row somewhere in memory full of rubbish: all of its bytes, and the row."""
    bytes_ = torch.full((512,), RUBBISH, dtype=torch.uint8)
    row = bytes_.view(x.dtype)[16 + offset :][: len(x)]
    row.copy_(x)
    return bytes_, row


def assert_nothing_else_changed(bytes_: Tensor, row: Tensor) -> None:
    others = bytes_.clone()
    others.view(row.dtype)[row.storage_offset() :][: len(row)] = 0
    others.view(row.dtype)[row.storage_offset() :][: len(row)].view(torch.uint8).fill_(RUBBISH)
    assert (others == RUBBISH).all()


def numbers(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count + 100 * seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_a_row_is_read_with_zeros_behind_it(offset: int, dtype: torch.dtype) -> None:
    for count in COUNTS:
        given, room = numbers(count, dtype), loops.whole(count)
        assert room % 16 == 0
        assert 0 <= room - count < 16
        source, row = surrounded(given, offset)
        target, x = surrounded(torch.full((room,), 7.0), 0)
        _rows(0, 0, row, dtype.itemsize, x, count)
        assert torch.equal(x[:count], given.float())
        assert not x[count:].any()
        assert torch.equal(row, given)
        assert_nothing_else_changed(source, row)
        assert_nothing_else_changed(target, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_a_row_is_added_to_no_more_than_its_own_numbers(offset: int, dtype: torch.dtype) -> None:
    for count in COUNTS:
        given, before = numbers(count, dtype), numbers(count, torch.float32, seed=1)
        source, row = surrounded(given, offset)
        target, x = surrounded(before, 0)
        _rows(0, 1, row, dtype.itemsize, x, count)
        assert torch.equal(x, before + given.float())
        assert torch.equal(row, given)
        assert_nothing_else_changed(source, row)
        assert_nothing_else_changed(target, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_a_row_is_written_and_rounded_without_a_byte_around_it(offset: int, dtype: torch.dtype) -> None:
    for count in COUNTS:
        given = numbers(count, torch.float32)
        target, row = surrounded(torch.zeros(count, dtype=dtype), offset)
        source, x = surrounded(given, 0)
        _rows(0, 2, row, dtype.itemsize, x, count)
        assert torch.equal(row, given.to(dtype))
        assert torch.equal(x, given)
        assert_nothing_else_changed(target, row)
        assert_nothing_else_changed(source, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_behind_a_row_is_read(dtype: torch.dtype) -> None:
    x = torch.zeros(64)
    for count in COUNTS:
        row = fenced(numbers(count, dtype)) if count else torch.empty(0, dtype=dtype)
        for kind in (0, 1, 2):
            _rows(0, kind, row, dtype.itemsize, x, count)


EDGES = {  # of rounding to bf16
    "ties": (0x3F808000, 0x3F818000, 0xBF808000, 0x00008000, 0x80018000),
    "denormals": (0x00000001, 0x00007FFF, 0x00008001, 0x807FFFFF),
    "the largest": (0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF),
    "infinite": (0x7F800000, 0xFF800000),
    "not a number": (0x7FC00000, 0xFFC00000),
    "not a number, as a GPU writes it": (0x7FFFFFFF,),
    "not a number of other bits": (0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FFF8000),
}


@pytest.mark.parametrize("bits", EDGES.values(), ids=EDGES)
def test_every_place_of_a_row_is_rounded_alike(bits: tuple[int, ...]) -> None:
    """In registers and behind them."""
    for one in bits:
        given = torch.from_numpy(np.full(21, one, np.uint32).view(np.float32))
        found, wanted = torch.zeros(21).bfloat16(), given.bfloat16()
        _rows(0, 2, found, 2, given, 21)
        assert torch.equal(found.isnan(), wanted.isnan()), f"{one:#x} -> {found.tolist()}"
        if not wanted.isnan().any():
            assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


def test_scratch_grows_and_is_kept() -> None:
    torch.set_num_threads(2)
    small = scratch(10)
    assert small.dtype == torch.float32
    assert small.numel() >= 20
    wanted = small.numel() + 1
    large = scratch(wanted)
    assert large.numel() >= 2 * wanted
    assert scratch(10).data_ptr() == scratch(wanted).data_ptr() == large.data_ptr()
    torch.set_num_threads(3)
    assert scratch(wanted).numel() >= 3 * wanted


def test_scratch_is_fp32_whatever_torch_makes_by_default() -> None:
    wanted = scratch(1).numel() + 1
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = scratch(wanted)
    finally:
        torch.set_default_dtype(before)
        loops._kept.__dict__.clear()
    assert found.dtype == torch.float32
    assert found.device.type == "cpu"


def test_each_python_thread_has_scratch_of_its_own() -> None:
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(scratch, 100).result()
    assert theirs.data_ptr() != scratch(100).data_ptr()


def test_two_python_threads_that_use_loops_at_once_do_not_disturb_each_other() -> None:
    torch.set_num_threads(2)
    weight = torch.ones(300)
    given = [numbers(300 * 8000, torch.float32, seed).view(8000, 300) for seed in range(2)]
    alone = [rows.add_rms_norm(x, x, weight, 1e-6) for x in given]
    together = threading.Barrier(2)

    def repeat(i: int) -> bool:
        torch.set_num_threads(2)
        together.wait(10)
        found = (rows.add_rms_norm(given[i], given[i], weight, 1e-6) for _ in range(10))
        return all(torch.equal(y, alone[i][0]) and torch.equal(total, alone[i][1]) for y, total in found)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(repeat, range(2)))


def double(a: Any) -> None:
    x = pointer(a[0], np.float32)
    x[0] = x[0] + x[0]


def runs(body: Callable[[Any], None]) -> bool:
    x = torch.tensor([21.0])
    Loop(body)(0, x)
    return x.tolist() == [42.0]


def test_a_loop_works_where_there_is_nowhere_to_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba keeps a function by its file, and this one is in none."""
    monkeypatch.setattr(double, "__code__", double.__code__.replace(co_filename="<nowhere>"))
    assert runs(double)


def test_a_loop_works_where_the_disk_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    assert runs(double)


def test_a_loop_works_where_what_was_kept_is_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a machine leaves it that went down while it was written."""
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    assert runs(double)
    kept = [path for path in tmp_path.rglob("*.nb?") if path.is_file()]
    assert kept
    for ending in ("nbc", "nbi"):
        for path in kept:
            if path.suffix == f".{ending}":
                path.write_bytes(path.read_bytes()[:100])
        assert runs(double)


ATTEND_AND_GATE = """
import torch
from triton_embed.kernels import dense_attention, rows
from triton_embed.kernels.packed import Packed

x = torch.ones(1, 1, 16)
dense_attention.attention(x, x, x, Packed.from_lengths([1]), False, 1.0)
print(rows.gated_activation(torch.full((1, 4), 4.0))[0, 0].item())
"""


def another_process(kernels: Path, kept: Path, code: str) -> str:
    """What it prints, with a copy of the kernels in place of ours."""
    environment = {**os.environ, "PYTHONPATH": str(kernels), "NUMBA_CACHE_DIR": str(kept)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=kernels, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def test_what_was_compiled_serves_the_next_process_until_a_helper_changes(tmp_path: Path) -> None:
    copy = tmp_path / "triton_embed" / "kernels"
    shutil.copytree(Path(loops.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    kept = tmp_path / "kept"
    wanted = 4 / (1 + np.exp(-4)) * 4

    assert float(another_process(tmp_path, kept, ATTEND_AND_GATE)) == pytest.approx(wanted, rel=1e-6)
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*.nb?")}
    assert before
    another_process(tmp_path, kept, ATTEND_AND_GATE)
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*.nb?")} == before

    with (copy / "simd.py").open("a") as file:  # which loops use that are in other files
        file.write("\n\n@helper\ndef exp2(x):\n    return splat(np.float32(3))\n")
    assert float(another_process(tmp_path, kept, ATTEND_AND_GATE)) == 4.0
